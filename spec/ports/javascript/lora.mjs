// A port in JavaScript for Node, without packages: LoRA on linear layers. Copy it, and call your own library where the mathematics is.
//
//     peft-ref check -- node spec/ports/javascript/lora.mjs
//
// It reads one JSON message per line and writes one per line; spec/protocol.md says what is in them. Below, a matrix is an array of rows.
//
//     y = x W^T + b + sum over adapters of  s (drop(x) A^T) B^T        s = alpha / r,  or alpha / sqrt(r) with use_rslora
//     W (out, in)    A (r, in)    B (out, r)

import { createInterface } from "node:readline";

const INFO = {
  name: "plain JavaScript",
  language: "JavaScript",
  version: "1",
  dtype: "float64",
  methods: ["lora"],
  layers: ["linear"],
  operations: ["forward", "backward", "delta", "merge", "unmerge"],
};

// ---- the mathematics

const scaleOf = (config) => config.lora_alpha / (config.use_rslora ? Math.sqrt(config.r) : config.r);

const factors = (adapter) => ({
  s: scaleOf(adapter.config),
  A: adapter.tensors["lora_A.weight"],
  B: adapter.tensors["lora_B.weight"],
});

function forward({ layer, adapters = [], x }) {
  const input = rows(x);
  let y = matmul(input, transpose(layer.weight));
  if (layer.bias) y = y.map((row) => row.map((value, i) => value + layer.bias[i]));
  for (const adapter of adapters) {
    const { s, A, B } = factors(adapter);
    y = add(y, matmul(matmul(drop(adapter, input), transpose(A)), transpose(B)), s);
  }
  return { y: shapedLike(x, y) };
}

// Gradients of sum(y * dy):  dx = dy W + s drop(dy B A)    dA = s (dy B)^T drop(x)    dB = s dy^T (drop(x) A^T)
function backward({ layer, adapters, x, dy }) {
  const input = rows(x);
  const output = rows(dy);
  let dx = matmul(output, layer.weight);
  const gradients = adapters.map((adapter) => {
    const { s, A, B } = factors(adapter);
    const dropped = drop(adapter, input);
    const throughB = matmul(output, B);
    dx = add(dx, drop(adapter, matmul(throughB, A)), s);
    return {
      "lora_A.weight": times(s, matmul(transpose(throughB), dropped)),
      "lora_B.weight": times(s, matmul(transpose(output), matmul(dropped, transpose(A)))),
    };
  });
  return { x: shapedLike(x, dx), adapters: gradients };
}

function delta({ adapters }) {
  const { s, A, B } = factors(adapters[0]);
  return { weight: times(s, matmul(B, A)) };
}

function shifted({ weight, bias }, adapters, sign) {
  for (const adapter of adapters) {
    const { s, A, B } = factors(adapter);
    weight = add(weight, matmul(B, A), sign * s);
  }
  return { weight, bias };
}

const merge = ({ layer, adapters }) => shifted(layer, adapters, 1);
const unmerge = ({ merged, adapters }) => shifted(merged, adapters, -1);

const OPERATIONS = { forward, backward, delta, merge, unmerge };

// ---- matrices as arrays of rows

const transpose = (a) => a[0].map((_, j) => a.map((row) => row[j]));
const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
const matmul = (a, b) => {
  const columns = transpose(b);
  return a.map((row) => columns.map((column) => dot(row, column)));
};
const times = (s, a) => a.map((row) => row.map((value) => s * value));
const add = (a, b, s) => a.map((row, i) => row.map((value, j) => value + s * b[i][j]));

// x (..., n) as an array of rows of n numbers
const rows = (x) => (Array.isArray(x[0]) ? x.flatMap(rows) : [x]);

// Undoes `rows`: the rows `flat` nested as in x.
function shapedLike(x, flat) {
  const remaining = flat.values();
  const nest = (part) => (Array.isArray(part[0]) ? part.map(nest) : remaining.next().value);
  return nest(x);
}

// x with the adapter's dropout: the mask is in the case (1 keeps), what is kept is divided by 1 - p.
function drop({ dropout }, x) {
  if (!dropout) return x;
  const mask = rows(dropout.mask);
  return x.map((row, i) => row.map((value, j) => (mask[i][j] * value) / (1 - dropout.p)));
}

// ---- the conversation

function answer(testCase) {
  const { id, operation, layer, adapters = [] } = testCase;
  if (!(operation in OPERATIONS) || layer.kind !== "linear") return { id, skipped: `no ${operation} on this layer` };
  if (adapters.some((adapter) => adapter.config.lora_bias)) return { id, skipped: "lora_bias is not built yet" };
  return { id, answer: OPERATIONS[operation](testCase) };
}

for await (const line of createInterface({ input: process.stdin })) {
  const message = JSON.parse(line);
  if (message.command === "stop") break;
  const reply = message.command === "start" ? INFO : answer(message.case);
  process.stdout.write(`${JSON.stringify(reply)}\n`);
}
