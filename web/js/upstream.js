/**
 * Where what arrives at a node comes from: through LoRAs, reroutes, bypassed nodes and subgraphs.
 */
import { hostsOf } from "./follow_model.js";

/** @typedef {import("./follow_model.js").Place} Place */

/**
 * A node with the subgraph nodes around it; where its subgraph is used more than once, the first.
 * @returns {Place}
 */
export function placeOf(node) {
  const hosts = [];
  for (let [host] = hostsOf(node.graph); host; [host] = hostsOf(host.graph)) hosts.unshift(host);
  return { node, hosts };
}

/**
 * The nearest node of one of these types that an input goes back to, along inputs of the same type.
 * @param {Place} place
 * @param {string} name of the input
 * @param {string[]} types
 * @returns {Place | undefined}
 */
export function producer(place, name, types) {
  const input = place.node.inputs?.find((each) => each.name === name);
  const kind = input?.type;
  const seen = new Set();
  let found = input && originOf(place, input);
  while (found && !types.includes(found.node.type)) {
    if (seen.has(found.node)) return undefined;
    seen.add(found.node);
    const next = found.node.inputs?.find((each) => each.type === kind || each.type === "*");
    found = next && originOf(found, next);
  }
  return found;
}

/** The node at the other end of an input's link, inside subgraphs and out of them. */
function originOf({ node, hosts }, input) {
  const link = input.link == null ? null : node.graph.getLink(input.link);
  return link ? sourceOf(node.graph, link, hosts) : undefined;
}

function sourceOf(graph, link, hosts) {
  if (link.origin_id === graph.inputNode?.id) {
    const host = hosts.at(-1);
    const outside = host?.inputs[link.origin_slot];
    return outside && originOf({ node: host, hosts: hosts.slice(0, -1) }, outside);
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node?.isSubgraphNode?.()) return node ? { node, hosts } : undefined;
  const inside = node.subgraph.getLink(node.subgraph.outputs[link.origin_slot]?.linkIds[0]);
  return inside ? sourceOf(node.subgraph, inside, [...hosts, node]) : undefined;
}
