// Layers that fared alike, as one row: the same cells, and names that are equal but for numbers.

const touchesOfModels = new WeakMap();

/** What each pass did to each layer: a map by layer for each record. */
function touchesByPass(model) {
  if (!touchesOfModels.has(model)) {
    touchesOfModels.set(model, model.records.map((record) => touchesOf(record, model.layersByName)));
  }
  return touchesOfModels.get(model);
}

/** Passes that touched a layer at all. */
function touchingPasses(model) {
  const touches = touchesByPass(model);
  return model.records.filter((record) => touches[record.index - 1].size > 0);
}

/** Groups {name, layers, touches}; `touches` is what each pass did to the first of them, by its index. */
function groupsOfLayers(model, layers) {
  const passes = touchingPasses(model);
  const groups = new Map();
  for (const layer of layers) {
    const touches = touchesOfLayer(model, layer, passes);
    const key = JSON.stringify([numberless(layer.fqn), touches.map(markOf), sameFacts(layer)]);
    if (!groups.has(key)) groups.set(key, { key, name: numberless(layer.fqn), layers: [], touches });
    groups.get(key).layers.push(layer);
  }
  return [...groups.values()].map((group) =>
    group.layers.length === 1 ? { ...group, name: group.layers[0].fqn } : group,
  );
}

function touchesOfLayer(model, layer, passes) {
  const touches = touchesByPass(model);
  return passes.map((record) => touches[record.index - 1].get(layer.fqn) ?? NO_TOUCH);
}

/** What must be equal in layers alike; measured quantities may differ and are shown as a range. */
function sameFacts(layer) {
  const { out_features, in_features, dtype, scheme, kernel, weight_bits, activation_bits, capacity } = layer;
  return [out_features, in_features, dtype, scheme, kernel, weight_bits, activation_bits, capacity, layer.skip];
}
