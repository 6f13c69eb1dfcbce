// Help, completion while typing a query, and the folders panel. clipkit.js comes first and offers what both use.
// Text is only ever set as textContent or an attribute; HTML comes escaped from the server's own templates.
"use strict";

(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const { does, search, again, fire, typing, unanswered } = window.clipkit;

  // ------------------------------------------------------------------ help
  // The rows of its table are the keys of the query language, so they serve completion as well.
  const keys = () => $$("#help [data-key]").map((row) => row.dataset.key);
  const quoted = (value) => (/[\s"]/.test(value) ? `"${value.replace(/["\\]/g, "\\$&")}"` : value);

  // What can follow `key:`, the most frequent first, as far as the page knows it.
  const values = (key) => {
    const fixed = $(`#help [data-key="${key}"]`)?.dataset.values;
    const source = { folder: "#filters [data-typed]", tag: "#tags option" }[key] || `#filters [name="${key}"] option`;
    const listed = () => $$(source).map((option) => option.dataset.typed ?? option.value);
    return (fixed ? fixed.split(" ") : listed()).filter(Boolean);
  };

  does.help = () => {
    for (const key of ["folder", "camera", "format", "tag"]) {
      const [value] = values(key);
      const example = $(`#help [data-key="${key}"] .try`);
      if (value) example.textContent = example.dataset.words = `${key}:${quoted(value)}`;
    }
    $("#help").showModal();
  };

  does.try = (button) => {
    $("#help").close();
    search(button.dataset.words);
  };

  addEventListener("keydown", (event) => {
    const empty = event.target === field() && !field().value; // it has the focus at the start
    if (event.key !== "?" || (typing(event.target) && !empty) || $("dialog[open]")) return;
    event.preventDefault();
    does.help();
  });

  // ------------------------------------------------------------------ completion
  const MOST = 8;
  let chosen = -1; // position in the list, -1: none

  const field = () => $("#ask [name=words]");
  const list = () => $("#completions");
  const options = () => $$("[role=option]", list());

  // The item of the query that ends at the cursor, unless it is inside a quoted phrase.
  const item = () => {
    const { value, selectionStart: end, selectionEnd } = field();
    const [text] = value.slice(0, end).match(/([a-z]+:"[^"]*|\S*)$/i);
    const before = value.slice(0, end - text.length);
    const open = (before.match(/"/g) || []).length % 2 || /\S/.test(value[end] || "") || end !== selectionEnd;
    return open || /\S$/.test(before) ? "" : text;
  };

  const completions = (text) => {
    const [, key, rest] = text.match(/^([a-z]+):"?(.*)$/i) || [];
    if (key === undefined) {
      if (!/^[a-z]{2,}$/i.test(text)) return [];
      return keys().filter((name) => name.startsWith(text.toLowerCase())).map((name) => `${name}:`);
    }
    if (!keys().includes(key.toLowerCase())) return [];
    const typed = rest.toLowerCase();
    const known = values(key.toLowerCase()).filter((value) => value.toLowerCase().includes(typed));
    known.sort((a, b) => b.toLowerCase().startsWith(typed) - a.toLowerCase().startsWith(typed)); // stable
    return known.slice(0, MOST).map((value) => `${key}:${quoted(value)}`).filter((full) => full !== text);
  };

  const choose = (position) => {
    chosen = position;
    for (const [at, option] of options().entries()) option.ariaSelected = String(at === position);
    const option = options()[position];
    if (option) field().setAttribute("aria-activedescendant", option.id);
    else field().removeAttribute("aria-activedescendant");
    option?.scrollIntoView({ block: "nearest" });
  };

  const suggest = (texts) => {
    const shown = texts.map((text, position) => {
      const option = document.createElement("li");
      option.id = `completion-${position}`;
      option.role = "option";
      option.textContent = text;
      return option;
    });
    list().replaceChildren(...shown);
    list().hidden = !texts.length;
    field().ariaExpanded = String(texts.length > 0);
    choose(-1);
  };

  const accept = (option) => {
    const text = option.textContent;
    const [from, to] = [field().selectionStart - item().length, field().selectionStart];
    field().setRangeText(text.endsWith(":") ? text : `${text} `, from, to, "end");
    suggest(completions(item()));
  };

  addEventListener("input", (event) => event.target === field() && suggest(completions(item())));
  addEventListener("submit", () => suggest([]), true);
  addEventListener("focusout", (event) => event.target === field() && suggest([]));
  addEventListener("mousedown", (event) => {
    const option = event.target.closest?.("#completions [role=option]");
    if (!option) return;
    event.preventDefault(); // the field keeps the focus
    accept(option);
  });

  // Before all other keys of the page, and only while there is something to complete.
  const presses = {
    ArrowDown: (all) => choose((chosen + 2) % (all.length + 1) - 1),
    ArrowUp: (all) => choose((chosen + all.length + 1) % (all.length + 1) - 1),
    Escape: () => suggest([]),
    Enter: (all) => chosen >= 0 && accept(all[chosen]),
    Tab: (all) => chosen >= 0 && accept(all[chosen]),
  };
  addEventListener(
    "keydown",
    (event) => {
      if (event.target !== field() || list().hidden || !presses[event.key] || event.isComposing) return;
      if (presses[event.key](options()) === false) return; // nothing chosen: Enter searches, Tab goes on
      event.preventDefault();
      event.stopImmediatePropagation();
    },
    true,
  );

  // ------------------------------------------------------------------ folders
  const panel = () => $("#folders");
  const key_of = (element) => element.closest("[data-key]").dataset.key;

  const fetched = async (address, key) => {
    const answer = await fetch(address, key === undefined ? {} : { method: "POST", body: key });
    if (!answer.ok) throw new Error((await answer.json()).error);
    return answer.text();
  };

  // Show a part of the panel as the server draws it, or say why it does not.
  const fill = async (part, html) => {
    const problem = $(".problem", panel());
    try {
      part.innerHTML = await html;
      part.hidden = false;
      problem.hidden = true;
    } catch (error) {
      problem.textContent = unanswered(error);
      problem.hidden = false;
    }
    return problem.hidden;
  };

  does.folders = () => {
    $(".listing", panel()).hidden = true;
    fill($(".indexed", panel()), fetched("folders"));
    panel().showModal();
  };

  does.browse = (button) => {
    if (!panel().open) does.folders();
    return fill($(".listing", panel()), fetched("folders/browse", button.dataset.key));
  };

  const index = (button) => {
    panel().close();
    fire("index", { key: key_of(button) });
  };
  does["check-again"] = does["index-chosen"] = index;

  const confirm = (button, shown) => {
    const row = button.closest("li");
    $(".confirm", row).hidden = !shown;
    $(`[data-do=${shown ? "keep" : "forget"}]`, row).focus();
  };
  does.forget = (button) => confirm(button, true);
  does.keep = (button) => confirm(button, false);
  does["forget-now"] = async (button) => {
    if (!(await fill($(".indexed", panel()), fetched("folders/forget", key_of(button))))) return;
    fire("refresh", {});
    again();
  };
})();
