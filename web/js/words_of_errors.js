/**
 * What an error says, without what a person has no use for.
 */
const MEMORY = /out ?of ?memory/i;
const OWN = /(^|\.)lens_core\./;
const TIPS = [
  "a smaller base_resolution or batch_size",
  "quantization int8_dynamic or uint4_sdnq in LensModelLoader",
  "placement stream in LensEncoderLoader",
  "closing other programs that use the GPU",
];

/** Whether the error is one that this pack raised on purpose, in whichever node. */
export function isOwnError(detail) {
  return OWN.test(detail.exception_type ?? "");
}

/** Whether a GPU's memory ran out: some drivers' errors say it in their text alone. */
export function isOutOfMemory(detail) {
  return MEMORY.test(`${detail.exception_type} ${detail.exception_message}`);
}

/**
 * The sentence of an execution_error: this pack's own as it is, which names what would fit; otherwise, when
 * memory ran out, the settings that need less.
 */
export function sentence(detail) {
  const message = (detail.exception_message ?? "").trim();
  if (isOwnError(detail)) return message.split("\n")[0];
  if (isOutOfMemory(detail)) return `The GPU's memory is full. Try ${TIPS.join("; or ")}.`;
  return message;
}

/**
 * What validate_inputs refused, of /prompt's node_errors; ComfyUI repeats it for every input.
 * @param {{errors?: {type: string, details: string, extra_info?: {input_name?: string}}[]}} error
 * @returns {string[]}
 */
export function refusals(error) {
  const refused = (error.errors ?? []).filter(({ type }) => type === "custom_validation_failed");
  const texts = refused.map(({ details, extra_info: info }) => {
    const prefix = `${info?.input_name} - `;
    return details.startsWith(prefix) ? details.slice(prefix.length) : details;
  });
  return [...new Set(texts)];
}
