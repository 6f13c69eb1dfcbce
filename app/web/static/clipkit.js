// The page's own behaviour: searching, the picture viewer, dropping, keyboard, theme. No library, and no request to any
// other server. Text from files or people is only ever set as textContent or an attribute.
"use strict";

(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const NARROW = ["folder", "after", "until"];
  const FIELDS = ["words", "picture", "similar", ...NARROW]; // of a search, and of its address
  const empty = () => ({ ...Object.fromEntries(FIELDS.map((key) => [key, ""])), k: 0 });
  let trigger = null; // set by attach(): sends an event to Python
  let current = empty();
  let ticket = 0;
  let arriving = true; // nothing has been shown yet
  let shown = -1; // position of the viewed picture among the cards on the page
  let opener = null; // what had the focus before the viewer

  // ------------------------------------------------------------------ theme
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themed = () => {
    const chosen = localStorage.getItem("clipkit-theme");
    const theme = chosen || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    document.body?.classList.toggle("dark", theme === "dark"); // Gradio's own toasts follow
  };
  dark.addEventListener("change", themed);
  themed();

  // ------------------------------------------------------------------ searching
  const field = (name) => $(`#filters [name=${name}]`);
  const filters = () => Object.fromEntries(NARROW.map((name) => [name, field(name)?.value || ""]));
  const narrow = () => {
    for (const name of NARROW) if (field(name)) field(name).value = current[name];
    $("#ask").classList.toggle("filtered", NARROW.some((name) => current[name]));
  };

  // The Sort page replaces the results, and has an address like a search.
  const evaluate = ({ words = "", choice = "" } = {}, { remember = true } = {}) => {
    ticket += 1;
    document.body.dataset.busy = "yes";
    if (remember) history.pushState({ evaluate: { words, choice } }, "", "#evaluate");
    trigger("evaluate", { words, choice, ticket: String(ticket) });
  };

  const back = (state) => {
    if (state?.evaluate || location.hash === "#evaluate") evaluate(state?.evaluate, { remember: false });
    else send(state || from_address(), { remember: false });
  };

  const send = (question, { remember = true } = {}) => {
    current = { ...empty(), ...question };
    ticket += 1;
    document.body.dataset.busy = "yes";
    $("#ask [name=words]").value = current.words;
    narrow();
    sample();
    if (remember) {
      const parameters = new URLSearchParams();
      for (const key of FIELDS) if (current[key]) parameters.set(key, current[key]);
      history.pushState(current, "", parameters.size ? `#${parameters}` : location.pathname + location.search);
    }
    const { k, ...rest } = current;
    trigger("ask", { ...rest, ...(k ? { k } : {}), ticket: String(ticket) });
  };

  // The picture of the search, shown in the search box as a small removable sample.
  const sample = () => {
    const box = $("#ask .sample");
    box.hidden = !(current.picture || current.similar);
    if (current.picture) $("img", box).src = `queries/${current.picture}`;
    if (current.similar) $("img", box).src = `thumbnails/${current.similar}`;
  };

  const from_address = () => {
    const parameters = new URLSearchParams(location.hash.slice(1));
    const question = empty();
    for (const key of FIELDS) question[key] = parameters.get(key) || "";
    return question;
  };

  // The start page of a library without pictures is out of date as soon as the status line says so:
  // indexing has begun or ended, or there are pictures to search.
  const renew = () => {
    const start = $("#results [data-view=empty]");
    const now = $("#status [data-stage]");
    if (!start || !now || start.dataset.stage === now.dataset.stage || document.body.dataset.busy) return;
    send(from_address(), { remember: false });
  };

  const answered = () => {
    const root = $("#results [data-view]");
    if (!root) return;
    document.body.dataset.view = root.dataset.view;
    if (arriving) {
      // Not before: the start page is still to come until now, and would replace an answer.
      arriving = false;
      if (location.hash.length > 1) return back(history.state);
    }
    if (root.dataset.ticket === undefined || root.dataset.ticket === String(ticket)) delete document.body.dataset.busy;
    ages();
    renew();
  };

  // ------------------------------------------------------------------ a dropped, pasted or chosen picture
  const notice = (sentence) => {
    const box = $("#ask .notice");
    box.textContent = sentence;
    box.hidden = !sentence;
  };

  const unanswered = (error) =>
    error instanceof TypeError ? "The clipkit server does not answer; check that it is running" : error.message;

  const ask_with = async (file) => {
    notice("");
    document.body.dataset.busy = "yes";
    try {
      const answer = await fetch("queries", {
        method: "POST",
        headers: { "Content-Type": "application/octet-stream" },
        body: file,
      });
      const payload = await answer.json();
      if (!answer.ok) throw new Error(payload.error);
      send({ picture: payload.id, ...filters() });
    } catch (error) {
      delete document.body.dataset.busy;
      notice(unanswered(error));
    }
  };

  const first_file = (transfer) => [...(transfer?.files || [])][0];
  let depth = 0;
  const dragging = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  addEventListener("dragenter", (event) => {
    if (dragging(event) && ++depth) document.body.dataset.drag = "yes";
  });
  addEventListener("dragleave", (event) => {
    if (dragging(event) && --depth <= 0) delete document.body.dataset.drag;
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    delete document.body.dataset.drag;
    const file = first_file(event.dataTransfer);
    if (file) ask_with(file);
  });
  addEventListener("paste", (event) => {
    const file = first_file(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    ask_with(file);
  });

  // ------------------------------------------------------------------ the viewer
  const cards = () => $$("#results .hit");
  const viewer = () => $("#viewer");

  const size_of = (bytes) => {
    const units = ["bytes", "kB", "MB", "GB"];
    let step = 0;
    while (bytes >= 1000 && step < 3) [bytes, step] = [bytes / 1000, step + 1];
    return `${step ? bytes.toFixed(bytes < 10 ? 1 : 0) : bytes} ${units[step]}`;
  };

  const fact = (name, ...values) => {
    const texts = values.filter(Boolean);
    if (!texts.length) return;
    const term = document.createElement("dt");
    term.textContent = name;
    const list = texts.map((value) => {
      const item = document.createElement("dd");
      item.append(value);
      return item;
    });
    $("#viewer dl").append(term, ...list);
  };

  const place_row = (path) => {
    const row = document.createElement("span");
    row.className = "place";
    const name = document.createElement("code");
    name.textContent = path;
    const copy = document.createElement("button");
    copy.type = "button";
    copy.dataset.do = "copy";
    copy.dataset.path = path;
    copy.textContent = "Copy";
    row.append(name, copy);
    return row;
  };

  const view = async (position) => {
    const all = cards();
    const card = all[position];
    if (!card) return;
    shown = position;
    const id = card.dataset.id;
    const box = viewer();
    const picture = $(".stage img", box);
    box.dataset.id = id;
    $(".stage p", box).hidden = true;
    picture.hidden = false;
    picture.alt = $("img", card).alt;
    picture.removeAttribute("style");
    // Show the thumbnail, which has the right shape, until the full picture has loaded.
    picture.src = $("img", card).src;
    const full = new Image();
    full.onload = () => box.dataset.id === id && (picture.src = full.src);
    full.onerror = () => box.dataset.id === id && gone(id);
    full.src = `pictures/${id}`;
    $("h2", box).textContent = picture.alt;
    $("dl", box).replaceChildren();
    judge(card);
    $("[data-do=previous]", box).disabled = position === 0;
    $("[data-do=next]", box).disabled = position === all.length - 1;
    if (!box.open) {
      opener = document.activeElement;
      box.showModal();
    }
    const answer = await fetch(`details/${id}`);
    const payload = await answer.json();
    if (box.dataset.id !== id) return;
    $("dl", box).replaceChildren();
    if (!answer.ok) return fact("Note", payload.error);
    picture.style.setProperty("--width", `${3 * payload.width + 40}px`);
    picture.style.setProperty("--height", `${3 * payload.height + 40}px`);
    $("h2", box).textContent = payload.captions[0] || payload.name;
    if (card.dataset.score) fact("Match", `${card.dataset.band}, cosine ${card.dataset.score}`);
    fact(payload.places.length > 1 ? "Places" : "Place", ...payload.places.map(place_row));
    fact("Captions", ...payload.captions.slice(1));
    fact("Tags", payload.tags.join(", "));
    fact("Size", `${payload.width} × ${payload.height}, ${payload.format}, ${size_of(payload.bytes)}`);
    fact("Taken", payload.taken_at && new Date(payload.taken_at).toLocaleString());
    fact("Camera", payload.camera);
  };

  const gone = async (id) => {
    const answer = await fetch(`pictures/${id}`);
    const payload = answer.ok ? {} : await answer.json();
    $("#viewer .stage p").textContent = payload.error || "This picture cannot be shown.";
    $("#viewer .stage p").hidden = false;
  };

  const close = () => viewer().close();
  const closed = () => {
    shown = -1;
    $(".stage img", viewer()).removeAttribute("src");
    opener?.focus({ preventScroll: false });
  };

  // ------------------------------------------------------------------ right or wrong
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));
  const marks_of = (card) => $$("[data-do=mark]", card);
  let marking = Promise.resolve(); // marks go out one after the other, in the order of the clicks

  // The viewer's two buttons show the same state as the card's.
  const judge = (card) => {
    const theirs = marks_of(card);
    $("#viewer .judge").hidden = !theirs.length;
    for (const [at, button] of $$("#viewer [data-do=mark-here]").entries()) {
      press(button, theirs.length && pressed(theirs[at]));
    }
  };

  const show_mark = (card, right) => {
    for (const button of marks_of(card)) press(button, right !== null && right === (button.dataset.right === "yes"));
    if (viewer().open && viewer().dataset.id === card.dataset.id) judge(card);
  };

  const show_total = (total) => {
    for (const summary of $$(".corrections")) {
      summary.hidden = !total;
      $(".total", summary).textContent = `${total.toLocaleString("en")} correction${total === 1 ? "" : "s"}`;
    }
  };

  const keep_mark = async (mark) => {
    const answer = await fetch("corrections", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(mark),
    });
    const payload = await answer.json();
    if (!answer.ok) throw new Error(payload.error);
    show_total(payload.corrections);
  };

  // Shown at once; undone if the server did not store it.
  const mark = (button) => {
    const card = button.closest(".hit");
    const was = marks_of(card).find(pressed);
    const before = was ? was.dataset.right === "yes" : null;
    const right = button === was ? null : button.dataset.right === "yes";
    const { query } = button.closest("[data-query]").dataset;
    show_mark(card, right);
    marking = marking
      .then(() => keep_mark({ picture: card.dataset.id, query, right }))
      .then(() => notice(""))
      .catch((error) => {
        show_mark(card, before);
        notice(unanswered(error));
      });
  };

  const mark_here = (button) => {
    const card = cards()[shown];
    if (card) mark(marks_of(card).find((theirs) => theirs.dataset.right === button.dataset.right));
  };

  // ------------------------------------------------------------------ keyboard
  const typing = (element) => element?.matches?.("input, textarea, select, [contenteditable]");

  const walk = (key) => {
    const all = $$("#results .hit .open");
    const here = all.indexOf(document.activeElement);
    if (here < 0) return false;
    let to = here + (key === "ArrowRight" ? 1 : key === "ArrowLeft" ? -1 : 0);
    if (key === "ArrowDown" || key === "ArrowUp") {
      const from = all[here].getBoundingClientRect();
      const middle = from.left + from.width / 2;
      const sign = key === "ArrowDown" ? 1 : -1;
      const ahead = all
        .map((element, position) => [element.getBoundingClientRect(), position])
        .filter(([box]) => sign * (box.top - from.top) > 10);
      if (!ahead.length) return true;
      const row = Math.min(...ahead.map(([box]) => sign * box.top)) * sign;
      to = ahead
        .filter(([box]) => Math.abs(box.top - row) < 10)
        .sort(([a], [b]) => Math.abs(a.left + a.width / 2 - middle) - Math.abs(b.left + b.width / 2 - middle))[0][1];
    }
    all[to]?.focus();
    return true;
  };

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (viewer()?.open) {
      if (event.key === "ArrowRight") view(shown + 1);
      else if (event.key === "ArrowLeft") view(shown - 1);
      else return; // Esc closes a <dialog> by itself
      event.preventDefault();
    } else if (event.key === "/" && !typing(event.target)) {
      event.preventDefault();
      $("#ask [name=words]").select();
    } else if (event.key === "Escape" && event.target.name === "words") {
      event.target.blur();
    } else if (event.key.startsWith("Arrow") && !typing(event.target) && walk(event.key)) {
      event.preventDefault();
    }
  });

  // ------------------------------------------------------------------ what buttons do
  const similar_to = (id) => {
    if (viewer().open) close();
    send({ similar: id, ...filters() });
    scrollTo({ top: 0 });
  };

  const copy = async (button) => {
    const path = button.dataset.path;
    try {
      await navigator.clipboard.writeText(path);
    } catch {
      // Not a secure context (a page opened over the network): select the path instead.
      getSelection().selectAllChildren($("code", button.parentElement));
      return;
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };

  const does = {
    open: (button) => view(cards().indexOf(button.closest(".hit"))),
    similar: (button) => similar_to(button.closest(".hit").dataset.id),
    mark,
    "mark-here": mark_here,
    "similar-here": () => similar_to(viewer().dataset.id),
    previous: () => view(shown - 1),
    next: () => view(shown + 1),
    close,
    copy,
    words: (button) => send({ words: button.dataset.words, ...filters() }),
    instead: ({ dataset: { words, filters: keep } }) =>
      send({ words, picture: current.picture, similar: current.similar, ...(keep ? filters() : {}) }),
    more: (button) => send({ ...current, k: Number(button.dataset.k) }, { remember: false }),
    "clear-filters": () => send({ words: current.words, picture: current.picture, similar: current.similar }),
    "clear-sample": () => send({ words: current.words, ...filters() }),
    pick: () => $("#ask input[type=file]").click(),
    filters: () => $("#ask").classList.toggle("open"),
    add: () => $("#adder").showModal(),
    "close-adder": () => $("#adder").close(),
    stop: () => trigger("stop", {}),
    dismiss: (button) => (button.closest(".run").hidden = true),
    home: () => send({}),
    evaluate: () => evaluate(),
    theme: () => {
      const now = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      localStorage.setItem("clipkit-theme", now);
      themed();
    },
  };

  addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button && !(button instanceof HTMLFormElement)) does[button.dataset.do]?.(button);
    else if (event.target instanceof HTMLDialogElement) event.target.close(); // the backdrop
  });

  addEventListener("submit", (event) => {
    const sent = event.target;
    event.preventDefault();
    if (sent.dataset.do === "search") {
      notice("");
      const words = sent.elements.words.value.trim();
      send({ words, picture: current.picture, similar: current.similar, ...filters() });
    } else if (sent.dataset.do === "sort") {
      evaluate({ words: sent.elements.words.value, choice: sent.elements.choice.value });
    } else if (sent.dataset.do === "index") {
      for (const refused of $$("#refusal .run")) refused.hidden = false; // the same may be said again
      trigger("index", { folder: sent.elements.folder.value });
      if (sent.closest("dialog")) sent.closest("dialog").close();
    }
  });

  addEventListener("change", (event) => {
    if (event.target.matches("#ask input[type=file]")) {
      if (event.target.files[0]) ask_with(event.target.files[0]);
      event.target.value = "";
    } else if (event.target.matches("#filters [name]")) {
      send({ ...current, words: $("#ask [name=words]").value.trim(), ...filters(), k: 0 });
    }
  });

  // ------------------------------------------------------------------ times as ages
  const ages = () => {
    const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
    for (const time of $$("time[datetime]")) {
      const seconds = (new Date(time.dateTime) - Date.now()) / 1000;
      if (Number.isNaN(seconds)) continue;
      const [unit, length] = [["day", 86400], ["hour", 3600], ["minute", 60]].find(([, l]) => -seconds >= l) || [];
      const age = unit ? relative.format(Math.round(seconds / length), unit) : "just now";
      if (time.textContent === age) continue; // an observer calls this: writing the same again would never end
      time.textContent = age;
      time.title = new Date(time.dateTime).toLocaleString();
    }
  };
  setInterval(ages, 30_000);

  // ------------------------------------------------------------------ Gradio's side
  window.clipkit = {
    // Called when the search form is on the page; `fire` sends an event to Python.
    attach(element, fire) {
      trigger = fire;
      themed();
      viewer().addEventListener("close", closed);
      new MutationObserver(answered).observe($("#results"), { childList: true, subtree: true });
      new MutationObserver(narrow).observe($("#filters"), { childList: true, subtree: true });
      new MutationObserver(() => (ages(), renew())).observe($("#status"), { childList: true, subtree: true, attributes: true });
      addEventListener("popstate", (event) => back(event.state));
      answered();
    },
  };
})();
