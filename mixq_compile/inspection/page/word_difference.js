// Which pieces of two versions of a line differ.

/** Both lists of tokens, with `differs` set on those that are not part of the longest common sequence. */
function markDifferences(before, after) {
  const lengths = commonLengths(before, after);
  const kept = [new Set(), new Set()];
  let [left, right] = [0, 0];
  while (left < before.length && right < after.length) {
    if (before[left].text === after[right].text) {
      kept[0].add(left++);
      kept[1].add(right++);
    } else if (lengths[left + 1][right] >= lengths[left][right + 1]) left += 1;
    else right += 1;
  }
  return [before, after].map((tokens, side) =>
    tokens.map((token, index) =>
      kept[side].has(index) || token.text.trim() === "" ? token : { ...token, differs: true },
    ),
  );
}

/** For each pair of places, the length of the longest common sequence of what follows. */
function commonLengths(before, after) {
  const lengths = Array.from({ length: before.length + 1 }, () => new Uint16Array(after.length + 1));
  for (let left = before.length - 1; left >= 0; left -= 1) {
    for (let right = after.length - 1; right >= 0; right -= 1) {
      lengths[left][right] =
        before[left].text === after[right].text
          ? lengths[left + 1][right + 1] + 1
          : Math.max(lengths[left + 1][right], lengths[left][right + 1]);
    }
  }
  return lengths;
}
