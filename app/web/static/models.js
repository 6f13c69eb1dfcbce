// The panel of models: switching, filling one beside another, removing. clipkit.js comes first and offers what it uses.
// Text is only ever set as textContent or an attribute; HTML comes escaped from the server's own templates.
"use strict";

(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const { does, again, fire, unanswered } = window.clipkit;
  const OPEN_SECONDS = 1; // between two looks at the models while the panel is open
  const IDLE_SECONDS = 20; // ... and at what others do, while the page can be seen
  const panel = () => $("#models");
  const problem = (sentence) => {
    const line = $(".problem", panel());
    line.textContent = sentence;
    line.hidden = !sentence;
  };

  let drawn = ""; // the list as the server drew it last
  const draw = (html) => {
    if (html === drawn) return;
    if (drawn && $(".listed .confirm:not([hidden])", panel())) return; // somebody is about to answer
    const focused = document.activeElement?.closest?.("#models .listed [data-do]");
    const [key, what] = [focused?.closest("[data-key]")?.dataset.key, focused?.dataset.do];
    drawn = html;
    $(".listed", panel()).innerHTML = html;
    if (what) $(`${key ? `[data-key="${CSS.escape(key)}"] ` : ""}[data-do="${what}"]`, panel())?.focus();
  };

  const fetched = async (address, body) => {
    const answer = await fetch(address, body === undefined ? { cache: "no-store" } : { method: "POST", body });
    if (!answer.ok) throw new Error((await answer.json()).error);
    return answer;
  };

  const look = async () => {
    try {
      draw(await (await fetched("models")).text());
      return true;
    } catch (error) {
      problem(unanswered(error));
      return false;
    }
  };

  // Ask for a change, and show the models as they are then. The status line shows it too.
  const change = async (what, name) => {
    problem("");
    try {
      const html = await (await fetched(`models/${what}`, name)).text();
      for (const open of panel().querySelectorAll(".confirm")) open.hidden = true;
      draw(html);
    } catch (error) {
      problem(unanswered(error));
      return false;
    }
    fire("refresh", {});
    return true;
  };

  const key_of = (element) => element.closest("[data-key]").dataset.key;
  const confirm = (button, shown) => {
    const row = button.closest("li");
    $(".confirm", row).hidden = !shown;
    $(`[data-do=${shown ? "keep-model" : "drop-model"}]`, row).focus();
  };

  does.models = () => {
    $("[popover]:popover-open")?.hidePopover();
    problem("");
    panel().showModal();
    look();
  };
  does["use-model"] = async (button) => (await change("use", key_of(button))) && again();
  does["fill-model"] = (button) => change("fill", key_of(button));
  does["drop-model"] = (button) => confirm(button, true);
  does["keep-model"] = (button) => confirm(button, false);
  does["drop-model-now"] = (button) => change("drop", key_of(button));

  does.teach = async ({ dataset: { what } }) => {
    problem("");
    try {
      draw(await (await fetched(`teach/${what}`, "")).text());
    } catch (error) {
      return problem(unanswered(error));
    }
    fire("refresh", {});
    if (what === "undo") again();
  };

  addEventListener("submit", async (event) => {
    if (event.target.dataset.do !== "fill-with") return;
    event.preventDefault();
    const field = event.target.elements.model;
    if (await change("fill", field.value)) field.value = "";
  });

  setInterval(() => panel()?.open && look(), 1000 * OPEN_SECONDS);

  // Another tab may have begun to index; it or another program may have switched the model. Ticks do not come for
  // a page whose connection broke in the middle of one: it finds out here too.
  const notice_others = async () => {
    if (document.hidden || document.body.dataset.lost) return;
    if (!$("#status [data-encoder]")) return fire("refresh", {}); // it could not be read the last time
    try {
      const now = await (await fetched("models/active")).json();
      const shown = $("#status [data-encoder]").dataset;
      const other = now.encoder_id && now.encoder_id !== shown.encoder;
      const changed = now.indexing !== Boolean(shown.indexing) || String(now.pictures) !== shown.pictures;
      if (other || changed) fire("refresh", {});
    } catch {
      // the next search says what is wrong
    }
  };
  addEventListener("visibilitychange", notice_others);
  setInterval(notice_others, 1000 * IDLE_SECONDS);
})();
