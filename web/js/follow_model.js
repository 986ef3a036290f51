/**
 * Which nodes a model reaches: along MODEL and GUIDER links, through LoRAs, reroutes and subgraphs.
 */
import { app } from "../../../scripts/app.js";
import { widgetOf } from "./host.js";

const CARRIES_MODEL = new Set(["MODEL", "GUIDER", "*"]);

/**
 * A node, and the subgraph nodes that it was reached through, the outermost first.
 * @typedef {{node: Object, hosts: Object[]}} Place
 */

/**
 * Every node that gets its model, or its guider, from this one, and the nodes that give them sigmas.
 * @returns {Place[]}
 */
export function reachedFrom(node) {
  const places = [];
  const seen = new Set();

  function leave(node, hosts) {
    for (const output of node.outputs ?? []) {
      if (CARRIES_MODEL.has(output.type)) arriveAll(node.graph, output.links ?? [], hosts);
    }
  }

  function arriveAll(graph, linkIds, hosts) {
    for (const id of linkIds) arrive(graph, graph.getLink(id), hosts);
  }

  function arrive(graph, link, hosts) {
    if (!link) return;
    if (link.target_id === graph.outputNode?.id) {
      const outer = hosts.length ? [hosts.at(-1)] : hostsOf(graph);
      for (const host of outer) {
        arriveAll(host.graph, host.outputs[link.target_slot]?.links ?? [], hosts.slice(0, -1));
      }
      return;
    }
    const target = graph.getNodeById(link.target_id);
    if (!target) return;
    if (target.isSubgraphNode?.()) {
      arriveAll(target.subgraph, target.subgraph.inputs[link.target_slot].linkIds, [...hosts, target]);
      return;
    }
    const key = [...hosts, target].map((each) => each.id).join(":");
    if (seen.has(key)) return;
    seen.add(key);
    places.push({ node: target, hosts }, ...sigmasOf(target).map((each) => ({ node: each, hosts })));
    leave(target, hosts);
  }

  leave(node, []);
  return places;
}

/** The nodes before this one's sigmas, in its own graph. */
function sigmasOf(node) {
  const slot = (node.inputs ?? []).findIndex((input) => input.name === "sigmas" || node.type === "Reroute");
  const link = slot < 0 ? null : node.graph.getLink(node.inputs[slot].link);
  const origin = link && node.graph.getNodeById(link.origin_id);
  return origin ? [origin, ...sigmasOf(origin)] : [];
}

/** The subgraph nodes whose inside this graph is. */
export function hostsOf(graph) {
  const everywhere = [app.rootGraph, ...app.rootGraph.subgraphs.values()];
  return everywhere.flatMap((each) => each.nodes.filter((node) => node.subgraph === graph));
}

/**
 * The widget that decides an input: its own, or a subgraph node's that shows it outside; none where a
 * connection decides.
 * @param {Place} place
 * @param {string} name
 * @returns {{node: Object, widget: Object} | undefined}
 */
export function decidingWidget({ node, hosts }, name) {
  const input = node.inputs?.find((each) => each.widget?.name === name);
  if (input?.link == null) {
    const widget = widgetOf(node, name);
    return widget && { node, widget };
  }
  const link = node.graph.getLink(input.link);
  const host = hosts.at(-1);
  if (!host || link?.origin_id !== node.graph.inputNode?.id) return undefined;
  const outside = host.inputs[link.origin_slot];
  return outside && decidingWidget({ node: host, hosts: hosts.slice(0, -1) }, outside.name);
}
