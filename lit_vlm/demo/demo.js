// The page: pictures, questions and answers. All text of a model becomes text nodes; nothing here writes HTML.

import { formatBox, formatNumber, parseAnswer, splitControlTokens } from "./markup.js";
import { MESSAGES } from "./messages.js";

const HEALTH_MS = 4000; // between two questions to the server whether it still runs
const MIN_BOX_PX = 4; // a smaller movement of the pointer is a click
const MARK = "□"; // where a question mentions its box

const $ = (id) => document.getElementById(id);
const state = {
  models: [],
  maxRequestBytes: 0,
  language: "en",
  pictures: [], // {blob, url, name, isPending}
  shown: null, // the picture on the stage
  turns: [], // {text, pictures, target, answers: [{model, text, state, note, controller, element}]}
  shownTurn: null,
  box: null, // [x1, y1, x2, y2] as fractions of the shown picture
  isDead: false,
  token: sessionStorage.getItem("token") ?? "",
};

const say = (key, ...values) => {
  const text = MESSAGES[state.language][key];
  return typeof text === "function" ? text(...values) : text;
};

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("aria-") || name === "role" || name === "lang") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// ---- language -------------------------------------------------------------------------------------------------------

function setLanguage(language) {
  state.language = language;
  document.documentElement.lang = language;
  document.title = say("title");
  $("title").textContent = say("title");
  $("language").textContent = say("other");
  $("language").lang = say("otherLanguage");
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", say(element.dataset.label));
  showModels();
  showMode();
  renderPictures();
  state.turns.forEach(renderTurn);
  renderBoxes();
  if (state.isDead) showBanner(say("dead"));
}

// ---- server ---------------------------------------------------------------------------------------------------------

const headers = () => (state.token ? { Authorization: `Bearer ${state.token}` } : {});

async function readError(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function start() {
  let response;
  try {
    response = await fetch("demo/settings", { headers: headers() });
  } catch {
    return markDead();
  }
  if (response.status === 401) {
    $("gate").hidden = false;
    if (state.token) showBanner(say("wrongToken"));
    return $("token").focus();
  }
  if (!response.ok) return showBanner(say("refused", await readError(response)));
  const settings = await response.json();
  state.models = settings.models;
  state.maxRequestBytes = settings.max_request_bytes;
  $("gate").hidden = true;
  hideBanner();
  $("main").hidden = false;
  $("max-tokens").value = Math.min(512, ...state.models.map((model) => model.max_new_tokens));
  showModels();
  $("question").focus();
}

function markDead() {
  state.isDead = true;
  showBanner(say("dead"));
}

async function checkHealth() {
  if (document.hidden) return;
  let isAlive;
  try {
    isAlive = (await fetch("health", { signal: AbortSignal.timeout(HEALTH_MS) })).ok;
  } catch {
    isAlive = false;
  }
  if (!isAlive) return markDead();
  if (state.isDead) {
    state.isDead = false;
    hideBanner();
    announce(say("alive"));
    if (!state.models.length) start();
  }
}

function showBanner(text) {
  $("banner").textContent = text;
  $("banner").hidden = false;
}

function hideBanner() {
  $("banner").hidden = true;
}

function announce(text) {
  $("announce").textContent = text;
}

const nameModel = (model, number) =>
  state.models.length > 1 && state.models[0].name === state.models[1].name ? `${model.name} (${number + 1})` : model.name;

function showModels() {
  const names = state.models.map((model, number) =>
    make("span", { className: `model model-${number}`, title: model.folder }, nameModel(model, number)),
  );
  $("models").replaceChildren(...names);
  const lacking = state.models.map((model, number) => [nameModel(model, number), model.missing_tokens]).filter(([, tokens]) => tokens.length);
  const isLacking = lacking.length > 0;
  for (const input of document.querySelectorAll("#modes input")) input.disabled = isLacking && input.value !== "ask";
  $("lacking").hidden = !isLacking;
  $("lacking").textContent = lacking.map(([name, tokens]) => say("lacking", name, tokens.join(" "))).join(" ");
}

const canUseTokens = () => state.models.every((model) => model.missing_tokens.length === 0);

// ---- pictures -------------------------------------------------------------------------------------------------------

async function addFiles(files) {
  for (const file of files) await addPicture(file);
}

async function addPicture(file) {
  hideBanner();
  const name = file.name || say("pictureName", state.pictures.length + 1);
  let response;
  try {
    response = await fetch("demo/picture", { method: "POST", headers: headers(), body: file });
  } catch {
    return markDead();
  }
  if (!response.ok) return showBanner(say("noPicture", name, await readError(response)));
  const url = URL.createObjectURL(file);
  try {
    const probe = new Image();
    probe.src = url;
    await probe.decode();
  } catch {
    URL.revokeObjectURL(url);
    return showBanner(say("cannotShow", name));
  }
  const picture = { blob: file, url, name, isPending: true };
  state.pictures.push(picture);
  showPicture(picture);
  renderPictures();
}

function showPicture(picture) {
  if (picture !== state.shown) state.box = null;
  state.shown = picture;
  $("canvas").hidden = !picture;
  $("empty").hidden = !!picture;
  if (picture) {
    $("shown").src = picture.url;
    $("shown").alt = picture.name;
  } else {
    $("shown").removeAttribute("src");
  }
  renderPictures();
  renderBoxes();
  renderQuestion();
}

function removePicture(picture) {
  URL.revokeObjectURL(picture.url);
  state.pictures = state.pictures.filter((other) => other !== picture);
  if (state.shown === picture) showPicture(state.pictures.at(-1) ?? null);
  renderPictures();
}

function makeThumbnail(picture) {
  const number = state.pictures.indexOf(picture) + 1;
  const image = make("img", { src: picture.url, alt: "" });
  return make(
    "button",
    {
      type: "button",
      className: "thumbnail",
      "aria-label": say("show", `${say("pictureName", number)} (${picture.name})`),
      "aria-pressed": String(picture === state.shown),
      onclick: () => showPicture(picture),
    },
    image,
  );
}

function renderPictures() {
  $("strip").replaceChildren(...(state.pictures.length > 1 ? state.pictures.map(makeThumbnail) : []));
  const pending = state.pictures.filter((picture) => picture.isPending);
  $("pending").replaceChildren(
    ...pending.map((picture) => {
      const remove = make("button", { type: "button", className: "remove", onclick: () => removePicture(picture) }, "×");
      remove.setAttribute("aria-label", say("remove", picture.name));
      return make("span", { className: "held" }, makeThumbnail(picture), remove);
    }),
  );
}

// ---- boxes ----------------------------------------------------------------------------------------------------------

function placeBox(element, box) {
  const [x1, y1, x2, y2] = box.map((value) => Math.min(Math.max(value, 0), 1) * 100);
  Object.assign(element.style, { left: `${x1}%`, top: `${y1}%`, width: `${x2 - x1}%`, height: `${y2 - y1}%` });
}

// List the mentions of the shown turn: {piece, answer number, mention number}
function listMentions(turn) {
  return turn.answers.map((answer) => parseAnswer(answer.text).filter((piece) => piece.type === "mention"));
}

function renderBoxes() {
  const elements = [];
  const turn = state.shownTurn;
  const lists = turn ? listMentions(turn) : [];
  if (turn && turn.target === state.shown) {
    lists.forEach((mentions, model) =>
      mentions.forEach((mention, number) =>
        mention.boxes.forEach((box) => {
          const label = mention.tag === "obj" ? mention.phrase : String(number + 1);
          const element = make("div", { className: `box model-${model} ${mention.tag}` }, make("span", { textContent: label }));
          element.dataset.mention = `${model}-${number}`;
          element.onpointerenter = (event) => event.buttons || highlight(turn, model, number);
          element.onpointerleave = () => highlight(null);
          placeBox(element, box);
          elements.push(element);
        }),
      ),
    );
  }
  if (state.box) {
    const element = make("div", { className: "box asked" });
    placeBox(element, state.box);
    elements.push(element);
  }
  $("boxes").replaceChildren(...elements);
  renderReadings(lists);
}

function renderReadings(lists) {
  const turn = state.shownTurn;
  $("readings").hidden = !lists.some((mentions) => mentions.length);
  $("reading-lists").replaceChildren(
    ...lists.flatMap((mentions, model) => {
      if (!mentions.length) return [];
      const items = mentions.map((mention, number) => {
        const phrase = make("span", { className: "phrase", textContent: mention.phrase });
        const corners = make("code", { textContent: mention.boxes.map(formatBox).join(" · ") });
        const item = make("li", {}, phrase, " ", corners);
        item.dataset.mention = `${model}-${number}`;
        item.onpointerenter = () => highlight(turn, model, number);
        item.onpointerleave = () => highlight(null);
        return item;
      });
      const title = make("h3", { className: `model-${model}`, textContent: nameModel(state.models[model], model) });
      return [...(state.models.length > 1 ? [title] : []), make("ol", {}, ...items)];
    }),
  );
}

function highlight(turn, model, number) {
  for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
  $("boxes").classList.toggle("some-lit", !!turn);
  if (!turn) return;
  if (turn !== state.shownTurn || turn.target !== state.shown) {
    state.shownTurn = turn;
    showPicture(turn.target);
  }
  const scopes = [$("boxes"), $("readings"), turn.element];
  for (const scope of scopes) {
    for (const element of scope.querySelectorAll(`[data-mention="${model}-${number}"]`)) element.classList.add("lit");
  }
}

async function copyReadings() {
  const lists = state.shownTurn ? listMentions(state.shownTurn) : [];
  const text = lists.map((mentions) => mentions.map((mention) => mention.phrase).join("\n")).filter(Boolean).join("\n\n");
  try {
    await navigator.clipboard.writeText(text);
    announce(say("copied"));
    $("copy").textContent = say("copied");
    setTimeout(() => ($("copy").textContent = say("copy")), 1500);
  } catch {
    showBanner(say("copyFailed")); // a page without https on another machine has no clipboard
  }
}

function locate(event) {
  const place = $("boxes").getBoundingClientRect();
  const clip = (value) => Math.min(Math.max(value, 0), 1);
  return [clip((event.clientX - place.left) / place.width), clip((event.clientY - place.top) / place.height)];
}

function watchDrawing() {
  const canvas = $("boxes");
  let from = null;
  canvas.addEventListener("pointerdown", (event) => {
    const mayDraw = canUseTokens() && event.button === 0 && (event.pointerType === "mouse" || getMode() === "ref");
    if (!mayDraw || !event.isPrimary) return; // a finger scrolls, unless a box is asked for
    highlight(null);
    from = { x: event.clientX, y: event.clientY, point: locate(event) };
    canvas.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!from || Math.max(Math.abs(event.clientX - from.x), Math.abs(event.clientY - from.y)) < MIN_BOX_PX) return;
    const [x, y] = locate(event);
    const [left, top] = from.point;
    state.box = [Math.min(x, left), Math.min(y, top), Math.max(x, left), Math.max(y, top)];
    renderBoxes();
  });
  const end = () => {
    if (!from) return;
    from = null;
    if (state.box) setBox(state.box);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
}

// Set the box of the next question; it becomes a question about this box.
function setBox(box) {
  state.box = box && box.map((value) => Number(value.toFixed(3)));
  if (box) setMode("ref");
  showBoxFields();
  renderBoxes();
  renderQuestion();
}

function showBoxFields() {
  ["x1", "y1", "x2", "y2"].forEach((id, number) => ($(id).value = state.box ? formatNumber(state.box[number]) : ""));
}

function readBoxFields() {
  const values = ["x1", "y1", "x2", "y2"].map((id) => $(id).valueAsNumber);
  const isBox = values.every((value) => value >= 0 && value <= 1) && values[0] <= values[2] && values[1] <= values[3];
  state.box = isBox && state.shown ? values : null;
  renderBoxes();
  renderQuestion();
}

// ---- question -------------------------------------------------------------------------------------------------------

const getMode = () => document.querySelector("#modes input:checked").value;

function setMode(mode) {
  document.querySelector(`#modes input[value=${mode}]`).checked = true;
  showMode();
}

function showMode() {
  const mode = getMode();
  $("question").placeholder = say({ ask: "placeholderAsk", ocr: "placeholderOcr", gro: "placeholderGro", ref: "placeholderRef" }[mode]);
  $("box-fields").hidden = mode !== "ref";
  $("boxes").classList.toggle("drawing", mode === "ref");
  renderQuestion();
}

// Compose the text that is sent, with control tokens as in training; null if something is missing.
function composeQuestion() {
  const mode = getMode();
  const typed = $("question").value.trim();
  if (mode === "ask") return typed || null;
  if (mode === "ocr") return typed ? `<ocr>\n${typed}` : "<ocr>";
  if (mode === "gro") return `<gro>\n${typed || say("defaultGro")}`;
  if (!state.box) return null;
  const mention = `<obj>${say("thing")}</obj><bbox>${formatBox(state.box)}</bbox>`;
  const text = typed || say("defaultRef");
  return text.includes(MARK) ? text.replace(MARK, mention) : `${mention} ${text}`;
}

function renderPieces(text) {
  return splitControlTokens(text).map((piece) =>
    make("span", { className: piece.type === "control" ? "control" : "", textContent: piece.text }),
  );
}

function renderQuestion() {
  const text = getMode() === "ask" ? null : composeQuestion();
  $("preview").hidden = text === null;
  $("preview").replaceChildren(...(text === null ? [] : renderPieces(text)));
}

function findMissing(mode) {
  if (mode !== "ask" && !state.shown) return "needPicture";
  if (mode === "ref" && !state.box) return "needBox";
  return mode === "ask" && !$("question").value.trim() ? "needText" : null;
}

const readDataUrl = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      const data = reader.result.slice(reader.result.indexOf(",") + 1);
      resolve(`data:image/${(blob.type.match(/^image\/([\w.+-]+)$/) ?? ["", "png"])[1]};base64,${data}`);
    };
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

async function send() {
  const mode = getMode();
  const missing = findMissing(mode);
  if (missing) return showBanner(say(missing));
  const pictures = state.pictures.filter((picture) => picture.isPending);
  const turn = { text: composeQuestion(), pictures, target: state.shown, language: state.language };
  turn.answers = state.models.map((model, number) => ({ model, number, text: "", state: "waiting", note: "" }));
  hideBanner();
  for (const picture of pictures) picture.isPending = false;
  state.turns.push(turn);
  state.shownTurn = turn;
  $("question").value = "";
  state.box = null;
  if (mode === "ref") setMode("ask");
  showBoxFields();
  turn.element = make("article", { className: "turn" });
  $("log").append(turn.element);
  renderTurn(turn);
  turn.element.scrollIntoView({ block: "nearest" });
  renderPictures();
  renderBoxes();
  renderQuestion();
  await Promise.all(turn.answers.map((answer) => ask(turn, answer)));
}

async function makeMessages(turn, answer) {
  const messages = [];
  for (const each of state.turns) {
    const given = each.answers[answer.number];
    if (each !== turn && (!given.text || given.state === "error")) continue; // nothing to remember, as if it was not asked
    const parts = [];
    for (const picture of each.pictures) parts.push({ type: "image_url", image_url: { url: await readDataUrl(picture.blob) } });
    messages.push({ role: "user", content: [...parts, { type: "text", text: each.text }] });
    if (each === turn) return messages;
    messages.push({ role: "assistant", content: given.text });
  }
  return messages;
}

// ---- answers --------------------------------------------------------------------------------------------------------

async function ask(turn, answer) {
  Object.assign(answer, { text: "", state: "waiting", note: "", controller: new AbortController(), asked: performance.now() });
  renderAnswer(turn, answer);
  showStop();
  try {
    await stream(turn, answer);
  } catch (error) {
    const isStopped = error.name === "AbortError";
    answer.state = isStopped ? "stopped" : "error";
    answer.note = isStopped ? say("stopped") : (error.isOurs ? error.message : say(answer.text ? "broken" : "dead"));
    if (!isStopped && !error.isOurs) checkHealth();
  }
  answer.controller = null;
  showStop();
  renderAnswer(turn, answer);
  announce(say("answered", nameModel(answer.model, answer.number), answer.note && answer.state !== "done" ? answer.note : stripMarkup(answer.text)));
}

const formatMegabytes = (bytes) => Number((bytes / 1e6).toPrecision(3));
const makeError = (text) => Object.assign(new Error(text), { isOurs: true });
const stripMarkup = (text) => parseAnswer(text).map((piece) => (piece.type === "mention" ? piece.phrase : piece.type === "text" ? piece.text : "")).join("");

async function stream(turn, answer) {
  const body = JSON.stringify({
    model: answer.model.name,
    messages: await makeMessages(turn, answer),
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: $("max-tokens").valueAsNumber || undefined,
    temperature: $("temperature").valueAsNumber || 0,
  });
  const size = new Blob([body]).size;
  if (size > state.maxRequestBytes) throw makeError(say("tooLarge", formatMegabytes(size), formatMegabytes(state.maxRequestBytes)));
  const response = await fetch(`${answer.model.base}/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body,
    signal: answer.controller.signal,
  });
  if (!response.ok) throw makeError(say("refused", await readError(response)));
  answer.state = "streaming";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream ended early");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      readEvent(answer, JSON.parse(event.replace(/^data: /, "")));
    }
    renderAnswer(turn, answer);
  }
}

function readEvent(answer, event) {
  if (event.error) throw makeError(say("refused", event.error.message));
  const choice = event.choices[0];
  if (choice?.delta.content) {
    answer.first ??= performance.now();
    answer.text += choice.delta.content;
  }
  if (choice?.finish_reason) {
    answer.state = "done";
    answer.note = choice.finish_reason === "length" ? say("cut") : "";
  }
  if (event.usage) {
    const seconds = (performance.now() - answer.asked) / 1000;
    const first = ((answer.first ?? performance.now()) - answer.asked) / 1000;
    answer.stats = [event.usage.completion_tokens, first.toFixed(2), (event.usage.completion_tokens / seconds).toFixed(1)];
  }
}

function showStop() {
  const isBusy = state.turns.some((turn) => turn.answers.some((answer) => answer.controller));
  $("stop").hidden = !isBusy;
  $("send").disabled = isBusy;
}

function stopAll() {
  for (const turn of state.turns) for (const answer of turn.answers) answer.controller?.abort();
}

function renderTurn(turn) {
  const pictures = make("div", { className: "strip small" }, ...turn.pictures.map(makeThumbnail));
  const text = make("p", { className: "asked-text" }, ...renderPieces(turn.text));
  const question = make("div", { className: "question" }, make("span", { className: "unseen", textContent: say("you") }), ...(turn.pictures.length ? [pictures] : []), text);
  const answers = make("div", { className: "answers-row" });
  turn.element.replaceChildren(question, answers);
  for (const answer of turn.answers) {
    answer.element = make("div", { className: `answer model-${answer.number}` });
    answers.append(answer.element);
    renderAnswer(turn, answer);
  }
}

function renderAnswer(turn, answer) {
  const edge = Math.min($("log").getBoundingClientRect().bottom, innerHeight);
  const isAtEnd = turn.element.getBoundingClientRect().bottom < edge + 60; // else the reader has scrolled away
  let mentions = 0;
  const pieces = parseAnswer(answer.text).map((piece) => {
    if (piece.type !== "mention") return make("span", { className: piece.type === "control" ? "control" : "", textContent: piece.text });
    const number = mentions++;
    const phrase = make("button", { type: "button", className: "phrase", textContent: piece.phrase, title: piece.boxes.map(formatBox).join("\n") });
    phrase.dataset.mention = `${answer.number}-${number}`;
    phrase.onpointerenter = phrase.onfocus = phrase.onclick = () => highlight(turn, answer.number, number);
    phrase.onpointerleave = phrase.onblur = () => highlight(null);
    return phrase;
  });
  const isBusy = answer.state === "waiting" || answer.state === "streaming";
  const parts = [make("p", { className: isBusy ? "text busy" : "text" }, ...pieces)];
  if (state.models.length > 1) parts.unshift(make("p", { className: "who", textContent: nameModel(answer.model, answer.number) }));
  if (answer.note) parts.push(make("p", { className: answer.state === "error" ? "note error" : "note", textContent: answer.note }));
  if (answer.stats && answer.state === "done") parts.push(make("p", { className: "note", textContent: say("stats", ...answer.stats) }));
  if ((answer.state === "error" || answer.state === "stopped") && turn === state.turns.at(-1)) {
    parts.push(make("button", { type: "button", className: "plain", textContent: say("retry"), onclick: () => ask(turn, answer) }));
  }
  answer.element.replaceChildren(...parts);
  if (turn === state.shownTurn) renderBoxes();
  if (isAtEnd && turn === state.turns.at(-1)) turn.element.scrollIntoView({ block: "end" });
}

function reset() {
  stopAll();
  for (const picture of state.pictures) URL.revokeObjectURL(picture.url);
  Object.assign(state, { pictures: [], turns: [], shownTurn: null, box: null });
  for (const turn of document.querySelectorAll("#log .turn")) turn.remove();
  $("question").value = "";
  setMode("ask");
  showBoxFields();
  showPicture(null);
  hideBanner();
  $("question").focus();
}

// ---- events ---------------------------------------------------------------------------------------------------------

function watch() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (!$("send").disabled) send();
  };
  $("question").onkeydown = (event) => {
    // 229: a browser that reports the end of a composition before this key
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!$("send").disabled) send();
  };
  $("question").oninput = renderQuestion;
  document.onkeydown = (event) => {
    if (event.key === "Escape" && !event.isComposing) stopAll();
  };
  $("stop").onclick = stopAll;
  $("reset").onclick = reset;
  $("language").onclick = () => {
    localStorage.setItem("language", say("otherLanguage"));
    setLanguage(say("otherLanguage"));
  };
  $("modes").onchange = showMode;
  for (const id of ["x1", "y1", "x2", "y2"]) $(id).oninput = readBoxFields;
  $("clear-box").onclick = () => setBox(null);
  $("copy").onclick = copyReadings;
  $("file").onchange = () => {
    addFiles([...$("file").files]);
    $("file").value = "";
  };
  $("empty").onclick = () => $("file").click();
  $("gate").onsubmit = (event) => {
    event.preventDefault();
    state.token = $("token").value;
    sessionStorage.setItem("token", state.token);
    start();
  };
  document.onpaste = (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    addFiles([...event.clipboardData.files]);
  };
  document.ondragover = (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  };
  document.ondragleave = (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  };
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    addFiles([...event.dataTransfer.files]);
  };
  watchDrawing();
  setInterval(checkHealth, HEALTH_MS);
}

watch();
// The language that a person chose here, else that of the setting `language`, else the browser's.
const wanted = [localStorage.getItem("language"), document.documentElement.dataset.language, navigator.language.slice(0, 2)];
setLanguage(wanted.find((language) => language in MESSAGES) ?? "en");
start();
