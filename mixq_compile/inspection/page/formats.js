// Numbers and names as a reader would write them.

const MINUS = "−";
const ABSENT = "–";

function formatBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let amount = bytes;
  while (amount >= 1024 && unit < units.length - 1) {
    amount /= 1024;
    unit += 1;
  }
  return `${significant(amount)} ${units[unit]}`;
}

/** Three significant digits, without an exponent. */
function significant(amount) {
  if (!amount) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(amount))));
  const text = amount.toFixed(Math.min(digits, 6));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function formatMicroseconds(microseconds) {
  return microseconds >= 1000 ? `${significant(microseconds / 1000)} ms` : `${significant(microseconds)} µs`;
}

function formatMilliseconds(milliseconds) {
  if (milliseconds >= 1000) return `${significant(milliseconds / 1000)} s`;
  return `${milliseconds >= 10 ? Math.round(milliseconds) : milliseconds.toFixed(1)} ms`;
}

function formatSeconds(seconds) {
  return formatMilliseconds(seconds * 1000);
}

/** `1 layer`, `2 layers`. */
function counted(number, singular, plural = `${singular}s`) {
  return `${number} ${number === 1 ? singular : plural}`;
}

/** By how much a quantity fell or grew, such as `−71%`. */
function formatChange(before, after) {
  if (!before) return "";
  const percent = Math.round((100 * (after - before)) / before);
  return `${percent < 0 ? MINUS : "+"}${Math.abs(percent)}%`;
}

/** The name with numbers replaced where they are a whole part of it, so that layers alike have one name. */
function numberless(name) {
  return name.replace(/(?<=\.)\d+(?=\.|$)/g, "*");
}

/** The file, line and code of a location such as `File "a/b.py", line 7, in forward: x = y`. */
function pythonLine(where) {
  const match = /^File "(.*)", line (\d+), in ([^:]*):?\s*(.*)$/s.exec(where);
  if (match === null) return { place: where, code: "" };
  return { place: `${match[1].split(/[\\/]/).at(-1)}:${match[2]}`, code: match[4] };
}

/** A pass's name, and its options. */
function splitSpec(spec) {
  const brace = spec.indexOf("{");
  return brace < 0 ? [spec, ""] : [spec.slice(0, brace), spec.slice(brace + 1, -1)];
}

function compactJson(value, most) {
  const text = JSON.stringify(value);
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}
