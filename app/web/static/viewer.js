// Looking at pictures: the viewer, marks of right and wrong, and the selection of several cards. Loaded before clipkit.js,
// which calls `clipkit_viewer` once with what the page around it does.
"use strict";

const clipkit_viewer = ({ $, $$, cards, more, can_load_more, similar_to, notice, unanswered, history_of_viewer }) => {
  const dialog = () => $("#viewer");
  const stage = () => $("#viewer .stage");
  const picture = () => $("#viewer .frame img");

  // What the page knows of a card's picture. `right` is its mark: true, false, or null for none.
  const item_of = (card) => {
    const marks = $$("[data-do=mark]", card);
    const pressed = marks.find((button) => button.getAttribute("aria-pressed") === "true");
    return {
      id: card.dataset.id,
      name: $("img", card).alt,
      path: card.dataset.path,
      band: card.dataset.band,
      score: card.dataset.score,
      query: card.closest("[data-query]")?.dataset.query || "",
      markable: marks.length > 0,
      right: pressed ? pressed.dataset.right === "yes" : null,
    };
  };

  // ------------------------------------------------------------------ the viewer
  // It steps through the cards of its opening and marks for their query, whatever the page shows meanwhile.
  let items = [];
  let at = 0;
  let origin = null; // the results that the cards were taken from
  const item = () => items[at];
  const may_grow = () => origin?.isConnected && can_load_more();

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
      const entry = document.createElement("dd");
      entry.append(value);
      return entry;
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

  const draw_position = () => {
    const count = may_grow() ? Number(origin.dataset.total) : items.length;
    $("#viewer .position").textContent = count > 1 ? `${(at + 1).toLocaleString("en")} of ${count.toLocaleString("en")}` : "";
    $("#viewer [data-do=previous]").disabled = at === 0;
    $("#viewer [data-do=next]").disabled = at === items.length - 1 && !may_grow();
  };

  const draw_marks = () => {
    $("#viewer .judge").hidden = !item().markable;
    for (const button of $$("#viewer [data-do=mark-here]")) {
      button.setAttribute("aria-pressed", String(item().right === (button.dataset.right === "yes")));
    }
  };

  const draw = async () => {
    const { id, name, band, score } = item();
    const box = dialog();
    const image = picture();
    box.dataset.id = id;
    set_zoom(false);
    notice("");
    image.alt = name;
    image.removeAttribute("style");
    // Show the thumbnail, which has the right shape, until the full picture has loaded.
    image.src = `thumbnails/${id}`;
    const full = new Image();
    full.onload = () => box.dataset.id === id && (image.src = full.src);
    full.onerror = () => box.dataset.id === id && gone(id);
    full.src = `pictures/${id}`;
    $("#viewer [data-full]").href = full.src;
    $("h2", box).textContent = name;
    $("dl", box).replaceChildren();
    draw_position();
    draw_marks();
    let payload;
    try {
      const answer = await fetch(`details/${id}`);
      payload = await answer.json();
      if (!answer.ok) throw new Error(payload.error);
    } catch (error) {
      if (box.dataset.id === id) fact("Note", unanswered(error));
      return;
    }
    if (box.dataset.id !== id) return;
    image.alt = name || payload.captions[0] || payload.name;
    // A small picture is enlarged twice at most.
    image.style.setProperty("--width", `${2 * payload.width}px`);
    image.style.setProperty("--height", `${2 * payload.height}px`);
    $("h2", box).textContent = payload.captions[0] || payload.name;
    if (score) fact("Match", `${band || "not calibrated"}, cosine ${score}`);
    fact(payload.places.length > 1 ? "Places" : "Place", ...payload.places.map(place_row));
    fact("Captions", ...payload.captions.slice(1));
    fact("Tags", payload.tags.join(", "));
    fact("Size", `${payload.width} × ${payload.height}, ${payload.format}, ${size_of(payload.bytes)}`);
    const date = payload.dated && new Date(payload.dated);
    if (payload.taken_at) fact("Taken", date.toLocaleString());
    else if (date) fact("Date", `File of ${date.toLocaleDateString(undefined, { dateStyle: "long" })}`);
    fact("Camera", payload.camera);
  };

  const gone = async (id) => {
    let sentence = "This picture cannot be shown.";
    try {
      const answer = await fetch(`pictures/${id}`);
      if (!answer.ok) sentence = (await answer.json()).error;
    } catch (error) {
      sentence = unanswered(error);
    }
    if (dialog().dataset.id === id) notice(sentence);
  };

  // Open at a card, or at the first card of a picture; one that has no card is shown alone.
  const open = (target) => {
    const all = cards();
    origin = $("#results [data-view]");
    items = all.map(item_of);
    at = target instanceof Element ? all.indexOf(target) : items.findIndex(({ id }) => id === target);
    if (at < 0) [items, at, origin] = [[{ id: target, name: "" }], 0, null];
    if (!dialog().open) dialog().showModal();
    draw();
  };

  const step = async (by) => {
    if (at + by >= items.length && may_grow()) {
      const { id } = item();
      await more();
      if (!dialog().open || item().id !== id) return;
      const known = new Set(items.map((known) => known.id));
      items.push(...cards().filter((card) => !known.has(card.dataset.id)).map(item_of));
    }
    if (!items[at + by]) return draw_position();
    at += by;
    history_of_viewer.step(item().id);
    draw();
  };

  const close = () => dialog().close();

  const closed = () => {
    if (dialog().open) return; // Back and Forward came before this event
    const { id } = item();
    picture().removeAttribute("src");
    delete dialog().dataset.id;
    history_of_viewer.leave();
    // The focus goes to the card that was seen last.
    $(`.hit[data-id="${id}"] .open`, $("#results"))?.focus();
  };

  // ------------------------------------------------------------------ zoom: its own size, or twice the fitted size of a small one
  const set_zoom = (on, x = 0.5, y = 0.5) => {
    const image = picture();
    const frame = $("#viewer .frame");
    if (on) {
      const [wide, high] = [image.naturalWidth, image.naturalHeight];
      const fitted = Math.min(image.clientWidth / wide, image.clientHeight / high);
      image.style.setProperty("--zoom", `${Math.round(wide * Math.max(1, 2 * fitted))}px`);
    }
    stage().classList.toggle("zoomed", on);
    $("#viewer [data-do=zoom]").setAttribute("aria-pressed", String(on));
    if (on) frame.scrollTo(frame.scrollWidth * x - frame.clientWidth / 2, frame.scrollHeight * y - frame.clientHeight / 2);
  };
  const zoomed = () => stage().classList.contains("zoomed");

  // A click or tap zooms where it was made; a mouse drags the zoomed picture; a finger swipes to the next one.
  const attach_gestures = () => {
    const frame = $("#viewer .frame");
    let dragged = 0;
    frame.addEventListener("pointerdown", (event) => {
      dragged = 0;
      if (event.pointerType === "mouse" && event.button === 0 && zoomed()) frame.setPointerCapture(event.pointerId);
    });
    frame.addEventListener("pointermove", (event) => {
      if (!frame.hasPointerCapture(event.pointerId)) return;
      dragged += Math.abs(event.movementX) + Math.abs(event.movementY);
      frame.scrollBy(-event.movementX, -event.movementY);
    });
    frame.addEventListener("dragstart", (event) => event.preventDefault());
    frame.addEventListener("click", (event) => {
      if (dragged > 5) return;
      const box = picture().getBoundingClientRect();
      set_zoom(!zoomed(), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    });
    let start = null; // of a swipe; not while two fingers or the browser itself zoom
    frame.addEventListener("touchstart", ({ touches: [first, second] }) => {
      start = second || zoomed() || visualViewport.scale > 1.01 ? null : first;
    }, { passive: true });
    frame.addEventListener("touchend", ({ changedTouches: [end] }) => {
      if (!start) return;
      const [x, y] = [end.clientX - start.clientX, end.clientY - start.clientY];
      start = null;
      if (Math.abs(x) > 40 && Math.abs(x) > 1.5 * Math.abs(y)) step(x < 0 ? 1 : -1);
    }, { passive: true });
  };

  // On the server's own screen; the server offers it only to this machine.
  const show_file = async (where) => {
    try {
      const answer = await fetch(`${where}/${item().id}`, { method: "POST" });
      if (!answer.ok) throw new Error((await answer.json()).error);
    } catch (error) {
      notice(unanswered(error));
    }
  };

  // ------------------------------------------------------------------ right or wrong
  let marking = Promise.resolve(); // marks go out one after the other, in the order of the clicks

  // On every card of this picture under the same query, and in the viewer.
  const show_mark = ({ id, query }, right) => {
    for (const card of $$(`.hit[data-id="${id}"]`, $("#results"))) {
      if (card.closest("[data-query]")?.dataset.query !== query) continue;
      for (const button of $$("[data-do=mark]", card)) {
        button.setAttribute("aria-pressed", String(right !== null && right === (button.dataset.right === "yes")));
      }
    }
    for (const known of items) if (known.id === id && known.query === query) known.right = right;
    if (dialog().open) draw_marks();
  };

  const show_total = (total) => {
    for (const summary of $$(".corrections")) {
      summary.hidden = !total;
      $(".total", summary).textContent = `${total.toLocaleString("en")} correction${total === 1 ? "" : "s"}`;
    }
  };

  const keep_mark = async (mark) => {
    const answer = await fetch("api/v1/marks", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(mark),
    });
    const payload = await answer.json();
    if (!answer.ok) throw new Error(payload.error);
    show_total(payload.total);
  };

  // Shown at once; undone if the server did not store it. The same mark again takes it back.
  const mark = (marked, right) => {
    if (!marked.markable) return;
    const before = marked.right;
    const after = right === before ? null : right;
    show_mark(marked, after);
    marking = marking
      .then(() => keep_mark({ image_id: marked.id, query: marked.query, right: after }))
      .then(() => notice(""))
      .catch((error) => {
        show_mark(marked, before);
        notice(unanswered(error));
      });
  };

  // ------------------------------------------------------------------ several pictures at once
  let choosing = false; // a click on a picture selects it
  let last = null; // id of the card that was selected or left out last: shift-click goes from there
  const selected = new Map(); // id -> item

  const draw_selection = (all = cards()) => {
    document.body.toggleAttribute("data-choosing", choosing);
    for (const card of all) {
      const box = $("[role=checkbox]", card);
      const checked = String(selected.has(card.dataset.id));
      if (box.ariaChecked !== checked) box.ariaChecked = checked; // thousands of others stay as they are
    }
    const bar = $("#selection");
    bar.hidden = !choosing;
    $(".total", bar).textContent = selected.size ? `${selected.size.toLocaleString("en")} selected` : "Select pictures";
    for (const button of $$("[data-do=mark-selected]", bar)) button.hidden = ![...selected.values()].some((one) => one.markable);
    for (const button of $$("[data-do=copy-selected], [data-do=mark-selected]", bar)) button.disabled = !selected.size;
  };

  const select = (card, { range = false } = {}) => {
    const all = cards();
    const here = all.indexOf(card);
    const from = range ? all.findIndex((other) => other.dataset.id === last) : -1;
    const on = from < 0 ? !selected.has(card.dataset.id) : selected.has(last);
    const affected = from < 0 ? [card] : all.slice(Math.min(from, here), Math.max(from, here) + 1);
    for (const one of affected) {
      if (on) selected.set(one.dataset.id, item_of(one));
      else selected.delete(one.dataset.id);
    }
    last = card.dataset.id;
    choosing = selected.size > 0;
    draw_selection();
  };

  const clear_selection = () => {
    selected.clear();
    [choosing, last] = [false, null];
    draw_selection();
  };

  // Pages that were opened over the network have no navigator.clipboard.
  const write_clipboard = async (text) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const field = document.createElement("textarea");
    field.value = text;
    ($("dialog[open]") || document.body).append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    if (!copied) throw new Error("The browser does not let this page copy");
  };

  const copy = async (button, text) => {
    const label = button.textContent;
    try {
      await write_clipboard(text);
    } catch (error) {
      return notice(error.message);
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  };

  const does = {
    open: (button, event) => {
      const card = button.closest(".hit");
      if (choosing) return select(card, { range: event.shiftKey });
      history_of_viewer.enter(card.dataset.id);
      open(card);
    },
    mark: (button) => mark(item_of(button.closest(".hit")), button.dataset.right === "yes"),
    "mark-here": (button) => mark(item(), button.dataset.right === "yes"),
    "mark-selected": (button) => {
      const right = button.dataset.right === "yes";
      for (const { id } of selected.values()) {
        const card = cards().find((one) => one.dataset.id === id);
        if (card && item_of(card).right !== right) mark(item_of(card), right);
      }
    },
    "similar-here": () => similar_to(item().id),
    previous: () => step(-1),
    next: () => step(1),
    zoom: () => set_zoom(!zoomed()),
    "open-file": () => show_file("open"),
    "show-in-folder": () => show_file("show"),
    close,
    copy: (button) => copy(button, button.dataset.path),
    select: (button, event) => select(button.closest(".hit"), { range: event.shiftKey }),
    choose: () => {
      choosing = true;
      draw_selection();
    },
    "copy-selected": (button) => copy(button, [...selected.values()].map(({ path }) => path).join("\n")),
    "clear-selection": clear_selection,
  };

  // Return whether the key did something. `card` is the one with the focus, if no viewer is open.
  const key = (name, card) => {
    const viewing = dialog().open;
    const target = viewing ? item() : card && item_of(card);
    if (viewing && name === "ArrowRight") step(1);
    else if (viewing && name === "ArrowLeft") step(-1);
    else if (viewing && name === "z") set_zoom(!zoomed());
    else if (target && name === "r") mark(target, true);
    else if (target && name === "x") mark(target, false);
    else if (target && name === "s") similar_to(target.id);
    else if (!viewing && card && name === "c") select(card);
    else if (!viewing && choosing && name === "Escape") clear_selection();
    else return false;
    return true;
  };

  return {
    does,
    key,
    open,
    close,
    clear_selection,
    draw_selection,
    is_open: () => dialog()?.open,
    attach() {
      dialog().addEventListener("close", closed);
      attach_gestures();
    },
  };
};
