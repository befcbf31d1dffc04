// Nodes as lines of a program, in coloured pieces that break where a reader would break them.

const INDENT = "    ";
const tokensOfRows = new WeakMap();

/** The pieces of a node's line: {kind, text, node}; `node` where the piece names one. */
function rowTokens(row) {
  if (!tokensOfRows.has(row)) tokensOfRows.set(row, readTokens(row));
  return tokensOfRows.get(row);
}

function readTokens(row) {
  const tokens = [];
  const add = (kind, text, node = null) => tokens.push({ kind, text, node });
  if (row.op === "output") {
    add("keyword", "return", row.name);
    add("plain", " ");
    addArguments(row, add);
  } else {
    add("name", row.name, row.name);
    add("plain", " = ");
    if (row.op.startsWith("call")) {
      add("target", row.target);
      add("plain", "(");
      addArguments(row, add);
      add("plain", ")");
    } else {
      add("keyword", row.op);
      if (row.target !== row.name) {
        add("plain", "[");
        add("target", row.target);
        add("plain", "]");
      }
    }
  }
  if (row.value) {
    add("plain", "  ");
    add("value", `# ${row.value}`);
  }
  const scheme = row.annotations.scheme;
  if (scheme) {
    add("plain", "  ");
    add("scheme", `[${scheme}]`);
  }
  return tokens;
}

function addArguments(row, add) {
  const inputs = new Set(row.inputs);
  for (const [text] of row.args.matchAll(/%[\w.]+|, |[^%,]+|[%,]/g)) {
    const name = text.startsWith("%") ? text.slice(1) : "";
    if (inputs.has(name)) add("link", text, name);
    else add("plain", text);
  }
}

function textOfTokens(tokens) {
  return tokens.map((token) => token.text).join("");
}

/** Tokens in lines of at most so many characters: broken behind spaces, later lines indented. */
function wrapTokens(tokens, columns) {
  const lines = [[]];
  let used = 0;
  const startLine = () => {
    lines.push([{ kind: "plain", text: INDENT, node: null }]);
    used = INDENT.length;
  };
  for (const piece of piecesOf(tokens)) {
    const visible = piece.length - (piece.tokens.at(-1).text.endsWith(" ") ? 1 : 0);
    if (used + visible > columns && used > INDENT.length) startLine();
    for (const token of piece.tokens) {
      let rest = token.text;
      while (used + rest.trimEnd().length > columns) {
        const room = Math.max(1, columns - used);
        lines.at(-1).push({ ...token, text: rest.slice(0, room) });
        rest = rest.slice(room);
        startLine();
      }
      lines.at(-1).push(rest === token.text ? token : { ...token, text: rest });
      used += rest.length;
    }
  }
  return lines;
}

/** Tokens that stay together, up to a space. */
function piecesOf(tokens) {
  const pieces = [];
  let current = { tokens: [], length: 0 };
  for (const token of tokens) {
    current.tokens.push(token);
    current.length += token.text.length;
    if (token.text.endsWith(" ")) {
      pieces.push(current);
      current = { tokens: [], length: 0 };
    }
  }
  if (current.tokens.length > 0) pieces.push(current);
  return pieces;
}

function countLines(tokens, columns) {
  const length = tokens.reduce((sum, token) => sum + token.text.length, 0);
  return length <= columns ? 1 : wrapTokens(tokens, columns).length;
}

/** The element of one line of code, wrapped, and cut off behind so many lines; its nodes can be clicked. */
function codeElement(tokens, columns, most = Infinity) {
  const lines = wrapTokens(tokens, columns);
  const spans = lines.slice(0, most).map((line, number) => [number > 0 ? "\n" : null, line.map(tokenElement)]);
  return element("code", null, spans, lines.length > most ? element("span", { class: "token-value" }, "…") : null);
}

function tokenElement({ kind, text, node, differs }) {
  if (kind === "plain" && !differs) return text;
  const classes = `token-${kind}${differs ? " differs" : ""}${node !== null && node === state.node ? " chosen" : ""}`;
  return element("span", { class: classes, "data-node": node }, text);
}
