// The page's own behaviour: searching, the history, loading more, dropping, keyboard, theme; viewer.js shows pictures. No
// library, and no request to any other server. Text from files or people is only ever set as textContent or an attribute,
// or comes escaped from the server's templates.
"use strict";

(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const NARROW = ["folder", "after", "until", "sort", "orientation", "format", "camera", "size"];
  const FIELDS = ["words", "picture", "similar", ...NARROW]; // of a search, and of its address
  const empty = () => ({ ...Object.fromEntries(FIELDS.map((key) => [key, ""])), k: 0 });
  let trigger = null; // set by attach(): sends an event to Python
  let current = empty();
  let ticket = 0;
  let classified = {}; // what the Classify page was last asked

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
    const set = NARROW.filter((name) => current[name]).length;
    $("#ask").classList.toggle("filtered", set > 0);
    $("#ask .set").textContent = set || "";
    $("#ask .set").hidden = !set;
    $("#ask [data-do=filters]").ariaLabel = `Filters and order${set ? `, ${set} set` : ""}`;
  };

  // ---- the history. The state of an entry has the page without the viewer: {question} or {evaluate:
  // {words, choice, floor, group, k}} (the Classify page; `group` is a number: all pictures of one word); k and y: how many cards were loaded and how far they were scrolled; view: id of the picture in the viewer, and
  // pushed: whether the entry before is the same page without it.
  history.scrollRestoration = "manual";
  const CLASSIFY = "classify"; // in an address: words of the Classify page
  const CLASSIFIED = ["choice", "floor", "group"]; // in its address, too
  let here = null; // address of the page that is shown or awaited, without the viewer
  let landing = null; // {y, view} of the entry whose answer is awaited

  const address_of = ({ evaluate, question }) => {
    const parameters = new URLSearchParams();
    if (evaluate) {
      parameters.set(CLASSIFY, evaluate.words);
      for (const key of CLASSIFIED) if (evaluate[key]) parameters.set(key, evaluate[key]);
    } else {
      for (const key of FIELDS) if (question[key]) parameters.set(key, question[key]);
    }
    return parameters.toString();
  };

  const from_address = () => {
    const parameters = new URLSearchParams(location.hash.slice(1));
    const view = /^[0-9a-f]{32}$/.exec(parameters.get("view"))?.[0];
    const words = parameters.get(CLASSIFY) ?? parameters.get("evaluate"); // its former name
    if (words !== null) {
      const rest = CLASSIFIED.map((key) => [key, parameters.get(key) || ""]);
      return { evaluate: { words, ...Object.fromEntries(rest), k: 0 }, view };
    }
    const question = empty();
    for (const key of FIELDS) question[key] = parameters.get(key) || "";
    return { question, view };
  };

  const write = (how, state) => {
    const parameters = [address_of(state), state.view && `view=${state.view}`].filter(Boolean).join("&");
    history[how](state, "", parameters ? `#${parameters}` : location.pathname + location.search);
  };

  const note = (changes) => write("replaceState", { ...(history.state || from_address()), ...changes });

  let noting = 0;
  const note_scroll = () => {
    clearTimeout(noting);
    if (!document.body.dataset.busy && !landing) note({ k: current.k, y: Math.round(scrollY) });
  };
  addEventListener("scroll", () => {
    clearTimeout(noting);
    noting = setTimeout(note_scroll, 150);
  }, { passive: true });
  addEventListener("pagehide", note_scroll);

  // Go to a page: a new entry of the history, or the same one if the address stays the same.
  const enter = (state) => {
    note_scroll();
    const address = address_of(state);
    write(address === here && !history.state?.view ? "replaceState" : "pushState", state);
  };

  const wait_for = (state, { y = 0, view = null } = {}) => {
    clearTimeout(noting);
    if (here !== address_of(state)) viewer.clear_selection();
    here = address_of(state);
    landing = { y, view };
    ticket += 1;
    document.body.dataset.busy = "yes";
    const { words, picture, similar } = state.question || {};
    const subject = state.evaluate ? "Classify" : words ? words : picture || similar ? "Similar pictures" : "";
    document.title = subject ? `${subject} – clipkit` : "clipkit";
    watch(ticket);
  };

  let leaving = null; // until the browser has gone back: an entry made before then would be left instead
  const history_of_viewer = {
    enter: (view) => {
      if (leaving) return leaving.then(() => history_of_viewer.enter(view));
      note_scroll();
      write("pushState", { ...(history.state || from_address()), view, pushed: true });
    },
    step: (view) => note({ view }),
    leave: () => {
      if (!history.state?.view) return;
      if (!history.state.pushed) return note({ view: undefined });
      const { promise, resolve } = Promise.withResolvers();
      leaving = promise.then(() => (leaving = null));
      addEventListener("popstate", resolve, { once: true });
      history.back();
    },
  };

  const back = (entry) => {
    const state = entry || from_address();
    if (!entry) write("replaceState", state);
    if (address_of(state) === here && !landing) {
      clearTimeout(noting);
      if (state.view) viewer.open(state.view);
      else if (viewer.is_open()) viewer.close();
      return;
    }
    if (viewer.is_open()) viewer.close();
    if (state.evaluate) evaluate(state.evaluate, { from: state });
    else send({ ...state.question, k: state.k || 0 }, { from: state });
  };

  // The Classify page replaces the results. `from` is the entry of the history, if it has one.
  const evaluate = ({ words = "", choice = "", floor = "", group = "", k = 0 } = {}, { from = null } = {}) => {
    if (leaving) return leaving.then(() => evaluate({ words, choice, floor, group, k }, { from }));
    const state = { evaluate: { words, choice, floor, group, k } };
    if (!from) enter(state);
    classified = state.evaluate;
    wait_for(state, from || {});
    trigger("evaluate", { ...classified, group: group === "" ? null : Number(group), ticket: String(ticket) });
  };

  const send = (question, { from = null } = {}) => {
    if (leaving) return leaving.then(() => send(question, { from }));
    const { k, ...rest } = { ...empty(), ...question };
    const state = { question: rest };
    if (!from) enter(state);
    current = { ...rest, k };
    wait_for(state, from || {});
    $("#ask [name=words]").value = current.words;
    narrow();
    sample();
    answer(rest, k, ticket);
  };

  // ---- the API. A page of results is HTML: cards, and a button with the cursor of the next page.
  const LEAST = 24;
  const MOST = 2400; // cards in one answer

  const fetch_html = async (address, options) => {
    const answer = await fetch(address, { cache: "no-store", ...options });
    if (!answer.ok) throw new Error((await answer.json()).error);
    return new DOMParser().parseFromString(await answer.text(), "text/html").body.firstElementChild;
  };

  const fetch_page = ({ words, picture, similar, sort, ...narrowed }, page) => {
    const filters = Object.fromEntries(Object.entries(narrowed).filter(([, value]) => value));
    if (/^\d+$/.test(filters.size)) filters.size = Number(filters.size);
    const subject = similar ? { image_id: similar } : { images: picture ? [picture] : [] };
    return fetch_html(similar ? "api/v1/similar" : "api/v1/search", {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/html" },
      body: JSON.stringify({ query: words, ...subject, filters, sort: sort || null, ...page }),
    });
  };

  // Add the cards of the next page, without those that the page has: the library may have changed.
  const join = (root, next) => {
    const grid = $(".grids", root).lastElementChild;
    const known = new Set($$(".hit", root).map((card) => card.dataset.id));
    const tiles = $$(".grid > li", next).filter((tile) => !known.has(tile.dataset.id));
    if (tiles[0]?.matches(".divider") && grid.lastElementChild.matches(".weak")) tiles.shift();
    if (tiles.length) $(".shown", root).textContent = $(".shown", next).textContent;
    grid.append(...tiles);
    $(".more", root).replaceWith(...$$(".more", next));
    return tiles;
  };

  // Where rows of cards begin and how high they are, as clipkit.css lays them out in a grid of some width: the browser
  // need not lay out thousands of cards to find out. It counts in 64ths of a pixel.
  const rows_of = (grid, tiles) => {
    const style = getComputedStyle(grid);
    const card = getComputedStyle(tiles.find((tile) => tile.matches(".hit")));
    const [row, least] = [parseFloat(style.getPropertyValue("--row")), parseFloat(style.getPropertyValue("--least"))];
    const [gap, lines] = [parseFloat(style.columnGap), parseFloat(card.paddingBottom)];
    const [width, most] = [grid.getBoundingClientRect().width, card.maxWidth === "none" ? Infinity : 1.5];
    const rows = [];
    let [used, shapes] = [Infinity, 0];
    for (const [at, tile] of tiles.entries()) {
      const shape = Math.max(parseFloat(tile.style.getPropertyValue("--ratio")), least); // NaN: a divider
      const wide = Math.floor(64 * (shape ? shape * row : DIVIDER)) / 64;
      if (used + gap + wide > width) {
        rows.push({ start: at });
        [used, shapes] = [-gap, 0];
      }
      used += gap + wide;
      shapes += shape || 0;
      rows.at(-1).height = Math.min(row + (width - used) / shapes, most * row) + lines;
    }
    return { rows, gap: parseFloat(style.rowGap) };
  };

  // Cut the last grid of each into grids of whole rows, with some BLOCK cards each, except the last, which grows. The
  // browser does not lay out those that are out of view (clipkit.css), so it needs their heights.
  const BLOCK = 120;
  const DIVIDER = 74; // its width
  const cut = () => {
    for (const grids of $$("#results .grids")) {
      let grid = grids.lastElementChild;
      const tiles = [...grid.children];
      if (tiles.length <= BLOCK) continue;
      const { rows, gap } = rows_of(grid, tiles);
      const blocks = [];
      for (const { start, height } of rows) {
        if (!blocks.length || start - blocks.at(-1).start >= BLOCK) blocks.push({ start, height: -gap });
        blocks.at(-1).height += gap + height;
      }
      const focused = document.activeElement;
      for (const [number, { start, height }] of blocks.entries()) {
        if (number) {
          grid = document.createElement("ol");
          grid.className = "grid";
          grid.append(...tiles.slice(start, blocks[number + 1]?.start));
          grids.append(grid);
        }
        if (blocks[number + 1]) grid.style.containIntrinsicHeight = `auto ${height}px`;
      }
      if (focused !== document.activeElement) focused.focus({ preventScroll: true }); // a card that was moved
    }
  };

  // A grid that leaves the view keeps its boxes, which take more memory than its cards: without display they are freed.
  addEventListener("contentvisibilityautostatechange", ({ target, skipped }) => {
    if (!skipped || !target.matches("#results .grid")) return;
    target.style.display = "none";
    getComputedStyle(target).display; // the style is computed, the page is not laid out
    target.style.display = "";
  });

  // In another width the rows are other ones.
  let width = innerWidth;
  const cut_again = () => {
    if (innerWidth === width) return;
    width = innerWidth;
    for (const grids of $$("#results .grids")) {
      const [first, ...rest] = grids.children;
      if (!rest.length) continue;
      const seen = cards().find((card) => card.getBoundingClientRect().bottom > innerHeight / 3);
      first.append(...rest.flatMap((grid) => [...grid.children]));
      for (const grid of rest) grid.remove();
      cut();
      seen?.scrollIntoView({ block: "center", behavior: "instant" });
    }
  };
  let resizing = 0;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(cut_again, 200);
  });

  // Ask for the first k cards, or one page of them.
  const fetch_results = async (question, k) => {
    const root = await fetch_page(question, { limit: Math.min(Math.max(k, LEAST), MOST) });
    for (let button; (button = $("[data-do=more]", root)); ) {
      const left = k - $$(".hit", root).length;
      if (left <= 0) break;
      const page = { limit: Math.min(left, MOST), cursor: button.dataset.cursor };
      if (!join(root, await fetch_page(question, page)).length) break;
    }
    return root;
  };

  const failure = (sentence) => {
    const root = document.createElement("div");
    root.className = "results failure";
    root.role = "alert";
    root.dataset.view = "results";
    root.append(document.createElement("p"));
    root.firstElementChild.textContent = sentence;
    return root;
  };

  // Show the answer to a search, or the start page without one. A server that does not answer is waited for.
  const answer = async (question, k, mine) => {
    let root = null;
    const start = !FIELDS.some((key) => question[key]);
    while (!root && mine === ticket) {
      try {
        root = await (start ? fetch_html("start") : fetch_results(question, k));
      } catch (error) {
        if (!(error instanceof TypeError)) root = failure(error.message);
        if (root && start) {
          // As while an index is being made: out of date at once, so `renew` asks again.
          Object.assign(root.dataset, { view: "empty", stage: "" });
          await sleep(1000);
        }
        if (!root) await sleep(400).then(check_server).then(() => sleep(600));
      }
    }
    await styled();
    if (mine === ticket) show(root);
  };

  // The first answer may come before the style: places and sizes would then be other ones.
  const styled = async () => {
    while (!getComputedStyle(document.documentElement).getPropertyValue("--accent")) await sleep(20);
  };

  const show = (root) => {
    $("#results .answers").replaceChildren(root);
    document.body.dataset.view = root.dataset.view;
    delete document.body.dataset.busy;
    tend();
    land();
    // The status line is drawn anew once it is out of date: the first search loads the model.
    const status = $("#status .status")?.dataset;
    const { model, pictures } = root.dataset;
    if (pictures && status && (model !== status.model || pictures !== status.pictures)) trigger("refresh", {});
  };

  // After cards were added: these, by default all.
  const tend = (added = cards()) => {
    cut();
    rove();
    viewer.draw_selection(added);
    watch_end();
    ages();
    renew();
  };

  // The Classify page comes by Gradio, which knows only the element that it is taken from.
  const take_classified = () => {
    const sent = $("#classified template")?.content.firstElementChild;
    if (sent && Number(sent.dataset.ticket) === ticket && document.body.dataset.busy) show(document.importNode(sent, true));
  };

  // The picture of the search, shown in the search box as a small removable sample.
  const sample = () => {
    const box = $("#ask .sample");
    box.hidden = !(current.picture || current.similar);
    if (current.picture) $("img", box).src = `queries/${current.picture}`;
    if (current.similar) $("img", box).src = `thumbnails/${current.similar}`;
  };

  // The start page of a library without pictures is out of date as soon as the status line says so:
  // indexing has begun or ended, or there are pictures to search. Another one follows its number.
  const renew = () => {
    const [total, number] = [$("#status .pictures"), $("#results .home .pictures")];
    if (total && number && number.textContent !== total.textContent) number.textContent = total.textContent;
    const start = $("#results [data-view=empty]");
    const now = $("#status [data-stage]");
    if (!start || !now || start.dataset.stage === now.dataset.stage || document.body.dataset.busy) return;
    send(from_address().question, { from: {} });
  };

  const land = () => {
    if (!landing) return;
    const { y, view } = landing;
    landing = null;
    if (y !== null) scrollTo({ top: y, behavior: "instant" });
    if (view) viewer.open(view);
  };

  // ------------------------------------------------------------------ more results, before their end comes into view
  const cards = () => $$("#results .hit");
  const more_button = () => $("#results [data-do=more]");
  let loading = null; // the request for more results

  const load_more = async (button) => {
    const [mine, root] = [ticket, button.closest("[data-view]")];
    const { cursor, limit, whole } = button.dataset;
    if (whole) return send({ ...current, k: Number(whole) }, { from: { ...history.state, y: null } });
    const { k, ...question } = current;
    const focused = button === document.activeElement;
    try {
      const next = await fetch_page(question, { cursor, limit: Number(limit) });
      if (mine !== ticket || !root.isConnected) return;
      const tiles = join(root, next);
      current.k = cards().length;
      note({ k: current.k });
      tend(tiles.filter((tile) => tile.matches(".hit")));
      if (focused) $(".open", tiles[0] || root)?.focus();
    } catch (error) {
      notice(unanswered(error));
    }
  };
  const more = async () => {
    const button = more_button();
    if (button && !document.body.dataset.busy) await (loading ||= load_more(button).finally(() => (loading = null)));
  };

  const end = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more(), {
    rootMargin: "500px",
  });
  const watch_end = () => {
    end.disconnect();
    const button = more_button();
    if (button) end.observe(button);
  };

  // ------------------------------------------------------------------ a server that does not answer
  const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
  const answers = async () => {
    try {
      return (await fetch("healthz", { cache: "no-store", signal: AbortSignal.timeout(10_000) })).ok;
    } catch {
      return false;
    }
  };
  // Gradio sends no event any more once one could not be sent, and says so in a toast.
  const given_up = () => $(".toast-wrap")?.textContent.includes("Connection Lost");

  // Once the server answers again, the page is loaded anew and shows what its entry of the history says.
  const check_server = async () => {
    if (document.body.dataset.lost || (!given_up() && (await answers()))) return;
    if (document.body.dataset.lost) return; // meanwhile
    document.body.dataset.lost = "yes";
    $("#lost").showPopover();
    while (!(await answers())) await sleep(1500);
    location.reload();
  };

  const watch = async (mine) => {
    for (let pause = 400; document.body.dataset.busy && mine === ticket; pause = 2000) {
      await sleep(pause);
      if (document.body.dataset.busy && mine === ticket) await check_server();
    }
  };

  // ------------------------------------------------------------------ a dropped, pasted or chosen picture
  const notice = (sentence) => {
    const box = $(viewer.is_open() ? "#viewer .stage p" : "#ask .notice");
    box.textContent = sentence;
    box.hidden = !sentence;
  };

  const unanswered = (error) => {
    if (!(error instanceof TypeError)) return error.message;
    check_server();
    return "The clipkit server does not answer; check that it is running";
  };

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

  // ------------------------------------------------------------------ looking at pictures
  const similar_to = (id) => {
    send({ similar: id, ...filters() });
    if (viewer.is_open()) viewer.close();
  };

  const viewer = clipkit_viewer({
    $, $$, cards, more, can_load_more: () => more_button() !== null, similar_to, notice, unanswered, history_of_viewer,
  });

  // ------------------------------------------------------------------ keyboard
  const typing = (element) => element?.matches?.("input, textarea, select, [contenteditable]");

  const focused_card = () => document.activeElement?.closest("#results .hit");

  // Grids in a row are one stop of the Tab key: their active card with the buttons on it. The arrow keys go from card to card.
  const active = new WeakMap(); // .grids -> card
  const rove = () => {
    for (const grids of $$("#results .grids")) if (!active.has(grids) && $(".hit", grids)) activate($(".hit", grids));
  };
  const activate = (card) => {
    const grids = card.closest(".grids");
    for (const button of $$("button", active.get(grids) || card)) button.tabIndex = -1;
    for (const button of $$("button", card)) button.tabIndex = 0;
    active.set(grids, card);
  };
  addEventListener("focusin", () => focused_card() && activate(focused_card()));

  const walk = (key) => {
    const all = cards();
    const at = all.indexOf(focused_card());
    if (at < 0) return false;
    const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
    let to = at + sign;
    if (key === "ArrowDown" || key === "ArrowUp") {
      const place = (card) => $(".open", card).getBoundingClientRect();
      const middle = ({ left, width }) => left + width / 2;
      const from = place(all[at]);
      const off = (card) => Math.abs(middle(place(card)) - middle(from));
      const away = (position) => sign * (place(all[position]).top - from.top); // rows above or below: no other is measured
      while (all[to] && away(to) <= 10) to += sign;
      if (!all[to] && key === "ArrowUp") $("#ask [name=words]").focus();
      const row = all[to] ? away(to) : 0;
      for (let next = to; all[next] && Math.abs(away(next) - row) < 10; next += sign) {
        if (off(all[next]) < off(all[to])) to = next;
      }
    }
    if (all[to]) $(".open", all[to]).focus();
    return true;
  };

  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("textarea")) {
      event.target.form?.requestSubmit();
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (!typing(event.target) && !$("dialog[open]:not(#viewer)") && viewer.key(event.key, focused_card())) {
      event.preventDefault();
    } else if ($("dialog[open]")) {
      return; // Esc closes a <dialog> by itself
    } else if (event.key === "/" && (!typing(event.target) || (event.target.name === "words" && !event.target.value))) {
      event.preventDefault();
      $("#ask [name=words]").select();
    } else if (event.target.name === "words" && event.key === "Escape") {
      event.target.blur();
    } else if (event.target.name === "words" && event.key === "ArrowDown" && event.target.matches("#ask input")) {
      $("#results .hit .open[tabindex='0']")?.focus();
      event.preventDefault();
    } else if (event.key.startsWith("Arrow") && !typing(event.target) && walk(event.key)) {
      event.preventDefault();
    }
  });

  // ------------------------------------------------------------------ what buttons do
  const does = {
    ...viewer.does,
    similar: (button) => similar_to(button.closest(".hit").dataset.id),
    words: (button) => send({ words: button.dataset.words, ...filters() }),
    instead: ({ dataset: { words, filters: keep } }) =>
      send({ words, picture: current.picture, similar: current.similar, ...(keep ? filters() : {}) }),
    more,
    "clear-filters": () => send({ words: current.words, picture: current.picture, similar: current.similar }),
    "clear-sample": () => send({ words: current.words, ...filters() }),
    pick: () => $("#ask input[type=file]").click(),
    filters: (button) => (button.ariaExpanded = String($("#ask").classList.toggle("open"))),
    "close-dialog": (button) => button.closest("dialog").close(),
    stop: () => trigger("stop", {}),
    dismiss: (button) => {
      button.closest(".run").hidden = true;
      if (button.closest("#run")) trigger("dismiss", {});
    },
    home: () => send({}),
    evaluate: () => evaluate(),
    class: ({ dataset: { group, k = 0 } }) => {
      const asked = { ...classified, group, k: Number(k) };
      if (k) note({ evaluate: asked });
      evaluate(asked, { from: k ? { ...history.state, y: null } : null });
    },
    theme: () => {
      const now = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      localStorage.setItem("clipkit-theme", now);
      themed();
    },
  };

  addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button && !(button instanceof HTMLFormElement)) does[button.dataset.do]?.(button, event);
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
      const { words, choice, floor } = sent.elements;
      evaluate({ words: words.value, choice: choice.value, floor: floor.value });
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
  // The page can be used before Gradio's first answer, which would stop the ticks that a later event began: events wait
  // for it. It has no status line where the index cannot be read, so not for ever.
  const first_status = async () => {
    for (let n = 0; n < 250 && !$("#status .status"); n += 1) await sleep(20);
  };

  window.clipkit = {
    does, // panel.js adds to it
    search: (words) => send({ words, ...filters() }),
    again: () => document.body.dataset.view === "evaluate" || send(current, { from: { ...history.state, y: null } }),
    fire: (name, data) => trigger(name, data),
    typing,
    unanswered,
    // Called when the search form is on the page; `fire` sends an event to Python.
    async attach(element, fire) {
      trigger = (name, data) => first_status().then(() => fire(name, data));
      // On a busy machine Gradio calls this before the parts of the page that come later are there.
      while (!["#status", "#filters", "#classified", "#results .answers"].every((part) => $(part))) await sleep(20);
      themed();
      viewer.attach();
      new MutationObserver(take_classified).observe($("#classified"), { childList: true, subtree: true });
      new MutationObserver(narrow).observe($("#filters"), { childList: true, subtree: true });
      new MutationObserver(() => (ages(), renew())).observe($("#status"), { childList: true, subtree: true, attributes: true });
      addEventListener("popstate", (event) => back(event.state));
      const { question } = from_address();
      $("#ask").classList.toggle("open", NARROW.some((name) => question?.[name]));
      if (location.hash.length > 1 || history.state?.y) return back(history.state);
      send({}, { from: {} });
      if (matchMedia("(hover: hover)").matches) $("#ask [name=words]").focus({ preventScroll: true });
    },
  };
})();
