// The viewer: the list of samples with its filters, and one record. Texts of data sets become text nodes, never HTML.

import { parseAnswer } from "./markup.js";

const ROWS = 50; // of a page of the list
const $ = (id) => document.getElementById(id);
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const MESSAGES = {
  en: {
    other: "한국어", otherLanguage: "ko", samples: "Samples", list: "List of samples", record: "Record", part: "Part", source: "Source", kind: "Kind", language: "Language",
    minTokens: "From tokens", maxTokens: "to", duplicates: "Duplicates only", curated: "Found by curation", unusable: "Unusable", previous: "Previous", next: "Next", pages: "Pages of the list",
    all: "all", none: "no (usable samples)", training: "training", held_out: "held out", enter: "Enter", tokenNeeded: "This server needs its token (LIT_VLM_TOKEN):",
    wrongToken: "The server does not accept this token.", dead: "The server does not answer. It may have ended; start it again.", refused: (text) => `The server says: ${text}`,
    count: (number) => `${number} found`, range: (first, last) => `${first} to ${last}`, empty: "Nothing passes these filters.",
    numbers: (row) => `${row.tokens} tokens, ${row.supervised} supervised, ${count(row.tiles, "tile")}`,
    picture: (number, each) => `picture ${number}: ${each.width} x ${each.height} pixels, ${count(each.tiles, "tile")}, ${each.tokens} tokens`,
    tile: (number) => (number ? `tile ${number}` : "base view"), imageTokens: (number) => `image: ${number} tokens`,
    conversation: "As the model sees it; green is in the loss", chosen: "Chosen answer; green is in the loss", rejected: "Rejected answer; green is in the loss",
    tokens: (number) => `${number} tokens`, leaveOut: "Leave out of training", flaggedOnly: "Left out only", left: "left out",
    flags: (number) => `${count(number, "record")} left out. Train without them with:`,
  },
  ko: {
    other: "English", otherLanguage: "en", samples: "샘플", list: "샘플 목록", record: "레코드", part: "구분", source: "소스", kind: "종류", language: "언어",
    minTokens: "토큰 수", maxTokens: "~", duplicates: "중복만", curated: "정제에서 찾음", unusable: "사용 불가", previous: "이전", next: "다음", pages: "목록 페이지",
    all: "전체", none: "아니요(사용 가능한 샘플)", training: "학습", held_out: "검증", enter: "들어가기", tokenNeeded: "이 서버에는 토큰(LIT_VLM_TOKEN)이 필요합니다:",
    wrongToken: "서버가 이 토큰을 받지 않습니다.", dead: "서버가 응답하지 않습니다. 종료되었다면 다시 시작하세요.", refused: (text) => `서버 메시지: ${text}`,
    count: (number) => `${number}개`, range: (first, last) => `${first}~${last}`, empty: "이 조건에 맞는 샘플이 없습니다.",
    numbers: (row) => `토큰 ${row.tokens}개, 학습 대상 ${row.supervised}개, 타일 ${row.tiles}개`,
    picture: (number, each) => `그림 ${number}: ${each.width} x ${each.height} 픽셀, 타일 ${each.tiles}개, 토큰 ${each.tokens}개`,
    tile: (number) => (number ? `타일 ${number}` : "전체 보기"), imageTokens: (number) => `그림: 토큰 ${number}개`,
    conversation: "모델이 보는 그대로입니다. 녹색이 손실에 들어갑니다", chosen: "선택된 답변, 녹색이 손실에 들어갑니다", rejected: "거절된 답변, 녹색이 손실에 들어갑니다",
    tokens: (number) => `토큰 ${number}개`, leaveOut: "학습에서 빼기", flaggedOnly: "뺀 것만", left: "뺌",
    flags: (number) => `레코드 ${number}개를 뺐습니다. 다음 설정으로 학습하면 쓰지 않습니다:`,
  },
};
const state = { language: "en", parts: {}, title: "", offset: 0, total: null, rows: [], current: null, flags: { num_flagged: 0, settings: [] }, token: sessionStorage.getItem("token") ?? "", urls: [], asked: 0, opened: 0 };

const say = (key, ...values) => {
  const text = MESSAGES[state.language][key];
  return typeof text === "function" ? text(...values) : text;
};
const format = (number) => number.toLocaleString(state.language);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

async function load(path, values = {}, body = null) {
  const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== false));
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  let response;
  try {
    const posted = { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
    response = await fetch(`view/${path}?${query}`, body ? posted : { headers });
  } catch {
    throw new Error(say("dead"));
  }
  if (response.ok) return response;
  if (response.status === 401) askForToken();
  const message = await response.json().then((body) => body.error.message, () => response.statusText);
  throw new Error(say("refused", message));
}

function askForToken() {
  $("gate").hidden = false;
  $("main").hidden = true;
  $("token").focus();
}

function showError(error) {
  $("banner").textContent = error.message;
  $("banner").hidden = false;
}

// Run an action; its error is shown in the banner.
async function attempt(action) {
  $("banner").hidden = true;
  try {
    await action();
  } catch (error) {
    showError(error);
  }
}

function setLanguage(language) {
  state.language = language;
  document.documentElement.lang = language;
  $("language").textContent = say("other");
  $("language").lang = say("otherLanguage");
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", say(element.dataset.label));
  showFilters();
  showFlags(state.flags);
  showRows();
  if (state.current) attempt(() => showRecord(state.current));
}

async function start() {
  const settings = await (await load("settings")).json();
  Object.assign(state, settings);
  $("title").textContent = document.title = state.title;
  $("gate").hidden = true;
  $("main").hidden = false;
  showFilters();
  showFlags(await (await load("flags")).json());
  await showPage(0);
}

// Show how many records are left out, and the settings that train without them.
function showFlags(flags) {
  state.flags = flags;
  $("flag-count").textContent = flags.num_flagged ? say("flags", flags.num_flagged) : "";
  $("settings").textContent = flags.settings.join("\n");
  $("settings").hidden = !flags.num_flagged;
}

async function setFlag() {
  const { part, sample } = state.current;
  const flagged = $("flag").getAttribute("aria-pressed") !== "true";
  showFlags(await (await load("flags", {}, { part, sample, flagged })).json());
  $("flag").setAttribute("aria-pressed", String(flagged));
  for (const row of state.rows) if (row.sample === sample && $("part").value === part) row.flagged = flagged;
  showRows();
}

function showFilters() {
  const part = $("part").value || "training";
  const found = state.parts[part] ?? { sources: {}, kinds: {}, languages: {}, curated: {}, faults: {} };
  const fill = (id, counts, first) => {
    const value = $(id).value;
    const options = Object.entries(counts).map(([name, count]) => make("option", { value: name, textContent: `${name} (${format(count)})` }));
    $(id).replaceChildren(...(first === null ? [] : [make("option", { value: "", textContent: first })]), ...options);
    if (value in counts) $(id).value = value;
  };
  const parts = Object.entries(state.parts).map(([name, each]) => make("option", { value: name, textContent: `${say(name)} (${format(each.samples)})` }));
  $("part").replaceChildren(...parts);
  if (parts.length) $("part").value = part;
  fill("source", found.sources, say("all"));
  fill("kind", found.kinds, say("all"));
  fill("sample-language", found.languages, say("all"));
  fill("curated", found.curated ?? {}, say("all"));
  $("curated-line").hidden = !Object.keys(found.curated ?? {}).length;
  fill("fault", found.faults, say("none"));
}

async function showPage(offset) {
  const number = ++state.asked;
  const part = $("part").value;
  const page = { part, offset, limit: ROWS };
  const fault = $("fault").value;
  const filters = {
    source: $("source").value,
    kind: $("kind").value,
    language: $("sample-language").value,
    min_tokens: $("min-tokens").value,
    max_tokens: $("max-tokens").value,
    duplicates: $("duplicates").checked,
    flagged: $("flagged").checked,
    curated: $("curated").value,
  };
  const response = fault ? await load("errors", { ...page, fault }) : await load("samples", { ...page, ...filters });
  const { total, rows } = await response.json();
  if (number !== state.asked) return; // a later request has been sent
  Object.assign(state, { offset, total, rows });
  showRows();
}

function showRows() {
  const elements = state.rows.map((row) => (row.fault ? makeFault(row) : makeRow(row)));
  $("rows").replaceChildren(...(elements.length ? elements : [make("p", { className: "fault", textContent: say("empty") })]));
  $("rows").scrollTop = 0;
  if (state.total !== null) $("count").textContent = say("count", format(state.total)); // no page has come yet
  $("range").textContent = state.rows.length ? say("range", format(state.offset + 1), format(state.offset + state.rows.length)) : "";
  $("previous").disabled = state.offset === 0;
  $("next").disabled = state.offset + state.rows.length >= state.total;
}

function makeRow(row) {
  const where = make("span", { className: "where", textContent: `${row.source} [${row.position}]` });
  const kind = make("span", { className: "faint", textContent: `${row.kind}, ${row.language}` });
  const numbers = make("span", { className: "under", textContent: `${say("numbers", row)}${row.flagged ? ` · ${say("left")}` : ""}` });
  const button = make("button", { type: "button" }, where, kind, numbers);
  button.dataset.sample = row.sample;
  button.setAttribute("aria-current", String(state.current?.sample === row.sample && state.current.part === $("part").value));
  button.onclick = () => attempt(() => showRecord({ part: $("part").value, sample: row.sample }));
  return button;
}

function makeFault(row) {
  return make("p", { className: "fault" }, make("strong", { textContent: row.fault }), ` ${row.origin}: ${row.reason}`);
}

async function showRecord(place) {
  const number = ++state.opened;
  const record = await (await load("record", place)).json();
  if (number !== state.opened) return; // a person has opened another one
  for (const url of state.urls) URL.revokeObjectURL(url);
  Object.assign(state, { current: place, urls: [] });
  for (const button of document.querySelectorAll("#rows button")) button.setAttribute("aria-current", String(Number(button.dataset.sample) === place.sample));
  $("flag-line").hidden = record.flagged === null; // no selection can leave it out
  $("flag").setAttribute("aria-pressed", String(record.flagged === true));
  const found = Object.entries(record.curated).flatMap(([name, lines]) => lines.map((line) => make("li", { textContent: `${name}: ${line}` })));
  $("found").replaceChildren(...found);
  $("found").hidden = !found.length;
  $("origin").textContent = `${record.origin} · ${record.kind}, ${record.language} · ${say("numbers", record)}`;
  const figures = record.pictures.map((picture, number) => makeFigure(record, picture, number, place));
  const texts = record.sequences.flatMap((sequence) => [
    make("h3", { textContent: `${say(sequence.name)} (${say("tokens", format(sequence.num_tokens))})` }),
    make("p", { className: "tokens" }, ...sequence.runs.map(makeRun)),
  ]);
  $("content").replaceChildren(make("div", { className: "shown" }, ...figures), ...texts);
}

function makeRun(run) {
  const text = run.type === "image" ? say("imageTokens", format(run.num_tokens)) : run.text;
  return make("span", { className: `run ${run.type}${run.supervised ? " supervised" : ""}`, textContent: text });
}

function makeFigure(record, picture, number, place) {
  const caption = say("picture", number + 1, picture);
  const canvas = make("div", { className: "canvas" }, makeImage("image", { ...place, image: number }, caption));
  if (number === 0) canvas.append(...makeBoxes(record)); // boxes of a record are those of its first picture
  const tiles = Array.from({ length: picture.tiles }, (_, tile) => makeImage("tile", { ...place, image: number, tile }, say("tile", tile)));
  return make("figure", {}, canvas, make("div", { className: "tiles" }, ...tiles), make("figcaption", { textContent: caption }));
}

function makeImage(path, values, alt) {
  const image = make("img", { alt, title: alt });
  load(path, values)
    .then((response) => response.blob())
    .then((blob) => {
      image.src = URL.createObjectURL(blob);
      state.urls.push(image.src);
    })
    .catch(showError);
  return image;
}

function makeBoxes(record) {
  return record.sequences.flatMap((sequence, number) =>
    parseAnswer(sequence.text)
      .filter((piece) => piece.type === "mention")
      .flatMap((piece) => piece.boxes.map((box) => makeBox(box, piece.phrase, number ? "second" : "first"))),
  );
}

function makeBox(box, phrase, name) {
  const [x1, y1, x2, y2] = box.map((value) => Math.min(Math.max(value, 0), 1) * 100);
  const element = make("div", { className: `box ${name}` }, make("span", { textContent: phrase }));
  Object.assign(element.style, { left: `${x1}%`, top: `${y1}%`, width: `${x2 - x1}%`, height: `${y2 - y1}%` });
  return element;
}

$("language").onclick = () => {
  localStorage.setItem("language", say("otherLanguage"));
  setLanguage(say("otherLanguage"));
};
$("filters").onsubmit = (event) => event.preventDefault();
$("filters").onchange = () => attempt(async () => {
  showFilters();
  await showPage(0);
});
$("previous").onclick = () => attempt(() => showPage(Math.max(0, state.offset - ROWS)));
$("next").onclick = () => attempt(() => showPage(state.offset + ROWS));
$("flag").onclick = () => attempt(setFlag);
$("gate").onsubmit = (event) => {
  event.preventDefault();
  state.token = $("token").value;
  sessionStorage.setItem("token", state.token);
  attempt(start);
};
// The language that a person chose here, else that of the setting `language`, else the browser's.
const wanted = [localStorage.getItem("language"), document.documentElement.dataset.language, navigator.language.slice(0, 2)];
setLanguage(wanted.find((language) => language in MESSAGES) ?? "en");
attempt(start);
