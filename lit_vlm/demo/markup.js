// Boxes in a model's answer, read as `read_mentions` of lit_vlm/evaluation/task_pack/box_scores.py reads them, and boxes in a
// question, written as `format_box` of lit_vlm/data/markup.py writes them.

export const CONTROL_TOKENS = ["<gro>", "<ocr>", "<char>", "</char>", "<obj>", "</obj>", "<bbox>", "</bbox>", "<delim>"];
const ANY_TOKEN = CONTROL_TOKENS.join("|");
const PHRASE = `<(obj|char)>((?:(?!${ANY_TOKEN})[^])+)</\\1>`;
const MENTION = new RegExp(`${PHRASE}\\s*<bbox>([^<]*(?:<delim>[^<]*)*)</bbox>`, "g");
const NUMBER = /^\s*[+-]?(?:\d+(?:_\d+)*\.?(?:\d+(?:_\d+)*)?|\.\d+(?:_\d+)*)(?:e[+-]?\d+)?\s*$/i;

function parseBox(text) {
  const parts = text.split(",");
  if (parts.length !== 4 || !parts.every((part) => NUMBER.test(part))) return null;
  const box = parts.map((part) => Number(part.replaceAll("_", "")));
  return box.every(Number.isFinite) && box[0] <= box[2] && box[1] <= box[3] ? box : null;
}

// Split an answer into pieces: {type: "text" or "control", text} and {type: "mention", tag, phrase, boxes}.
export function parseAnswer(text) {
  const pieces = [];
  let position = 0;
  for (const found of text.matchAll(MENTION)) {
    const boxes = found[3].split("<delim>").map(parseBox);
    if (boxes.includes(null)) continue;
    pieces.push(...splitControlTokens(text.slice(position, found.index)));
    pieces.push({ type: "mention", tag: found[1], phrase: found[2].trim(), boxes });
    position = found.index + found[0].length;
  }
  pieces.push(...splitControlTokens(text.slice(position)));
  return pieces;
}

export function splitControlTokens(text) {
  return text
    .split(new RegExp(`(${ANY_TOKEN})`))
    .filter((piece) => piece !== "")
    .map((piece) => ({ type: CONTROL_TOKENS.includes(piece) ? "control" : "text", text: piece }));
}

// Three decimals without trailing zeros, as Python's str(round(value, 3)): 0.51, 0.0, 1.0.
export function formatNumber(value) {
  const text = String(Number(value.toFixed(3)));
  return text.includes(".") ? text : `${text}.0`;
}

export function formatBox(box) {
  return box.map(formatNumber).join(", ");
}
