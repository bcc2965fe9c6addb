// The page: loads a quantized layer, runs it, and shows agreement, time and the distribution of the weights.

import { Layer, histogram, medianTime, plainProduct, readTensors, relativeError } from "./layer.mjs";

const BLOCK = 64;

/// The shortest module with an instruction of 128-bit SIMD: a function that drops a vector.
const SIMD_PROBE = Uint8Array.of(
    0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11,
);

const element = (id) => document.getElementById(id);

function check(name, holds, detail) {
    const item = document.createElement("li");
    item.textContent = `${name}: ${holds ? "yes" : "NO"}${detail ? ` (${detail})` : ""}`;
    item.classList.toggle("failed", !holds);
    element("checks").append(item);
    return holds;
}

function bits(values) {
    return new Uint32Array(new Float32Array(values).buffer);
}

function sameBits(a, b) {
    const [x, y] = [bits(a), bits(b)];
    return x.length === y.length && x.every((word, i) => word === y[i]);
}

function addRow(cells, tag = "td") {
    const row = element("times").insertRow();
    for (const text of cells) {
        const cell = document.createElement(tag);
        cell.textContent = text;
        row.append(cell);
    }
}

/// The histogram as an SVG picture.
function draw(counts, total) {
    const [width, height, bottom, step] = [736, 260, 40, 46];
    const svg = (name, attributes, text = "") => {
        const node = document.createElementNS("http://www.w3.org/2000/svg", name);
        for (const [key, value] of Object.entries(attributes)) {
            node.setAttribute(key, value);
        }
        node.textContent = text;
        return node;
    };
    const style = { role: "img", "font-size": 11, "text-anchor": "middle" };
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, ...style });
    picture.append(svg("title", {}, "Histogram of the codes"));
    const most = Math.max(...counts);
    counts.forEach((count, code) => {
        const bar = (count / most) * (height - bottom - 20);
        const [x, top] = [code * step, height - bottom - bar];
        picture.append(
            svg("rect", { x: x + 4, y: top, width: step - 8, height: bar, fill: "#4878a8" }),
            svg("text", { x: x + step / 2, y: top - 5 }, `${((100 * count) / total).toFixed(1)} %`),
            svg("text", { x: x + step / 2, y: height - bottom + 16, "font-weight": "bold" }, String(code)),
        );
    });
    picture.append(svg("text", { x: width / 2, y: height - 4 }, "code"));
    element("histogram").append(picture);
}

/// The times of a product of `layers` and of JavaScript on f32 weights.
function time(what, layers, weights, x) {
    const y = new Float32Array(layers[0].rows);
    const plain = medianTime(() => plainProduct(weights, x, y));
    const row = (name, nanoseconds) => {
        const perNanosecond = (weights.length / nanoseconds).toFixed(2);
        const factor = (plain / nanoseconds).toFixed(1);
        addRow([what, name, `${(nanoseconds / 1000).toFixed(1)} µs`, perNanosecond, `${factor} ×`]);
    };
    row("JavaScript f32", plain);
    for (const layer of layers) {
        row(`NF4, ${layer.isa}`, medianTime(() => layer.forward(x)));
    }
}

/// Random codes, scales and inputs of a size that no cache holds as f32.
function randomLayer(rows, cols) {
    let state = 1;
    const next = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) >>> 16;
    return {
        packed: Uint8Array.from({ length: (rows * cols) / 2 }, next),
        absmax: Float32Array.from({ length: (rows * cols) / BLOCK }, () => 0.05 + next() / 2 ** 20),
        x: Float32Array.from({ length: cols }, () => next() / 2 ** 15 - 1),
    };
}

async function main() {
    const simd = WebAssembly.validate(SIMD_PROBE);
    const [file, ...layers] = await Promise.all([
        fetch("layer.safetensors").then((response) => response.arrayBuffer()),
        ...["simd128", "scalar"]
            .filter((isa) => simd || isa === "scalar")
            .map((isa) => fetch(`nf4-${isa}.wasm`).then((response) => Layer.load(response))),
    ]);
    const { packed, absmax, x, bias, y64 } = readTensors(file);
    const [batch, cols] = x.shape;
    const rows = y64.shape[1];
    layers.forEach((layer) => layer.set(packed.values, absmax.values, rows, cols, BLOCK));
    const bytes = packed.values.byteLength + absmax.values.byteLength;
    element("layer").textContent =
        `all-MiniLM-L6-v2, first query projection: ${rows} × ${cols} weights in ${bytes} bytes ` +
        `(f32: ${rows * cols * 4}), ${batch} real activations, on ${layers.map((layer) => layer.isa).join(" and ")}`;

    const weights = layers[0].dequantize();
    const results = { y: layers.map(() => []), plain: [] };
    for (let n = 0; n < batch; n++) {
        const input = x.values.subarray(n * cols, (n + 1) * cols);
        layers.forEach((layer, i) => results.y[i].push(...layer.forward(input)));
        results.plain.push(...plainProduct(weights, input, new Float32Array(rows)));
    }
    const biased = (y) => y.map((value, i) => value + bias.values[i % rows]);
    const reference = relativeError(biased(results.y[0]), y64.values);
    const plain = relativeError(results.y[0], results.plain);
    const percent = (error) => `largest error ${(100 * error).toFixed(3)} % of the rms`;
    const holds = [
        check("SIMD and scalar WebAssembly give the same bits", results.y.every((y) => sameBits(y, results.y[0]))),
        check("The module of the first row below has SIMD", layers[0].isa === "simd128"),
        check("The outputs are those of bitsandbytes", reference < 2e-3, percent(reference)),
        check("They are those of JavaScript on the restored weights", plain < 2e-3, percent(plain)),
    ];

    const counts = histogram(packed.values);
    draw(counts, rows * cols);

    addRow(["layer", "", "time", "weights/ns", "speed"], "th");
    time(`${rows} × ${cols}`, layers, weights, x.values.slice(0, cols));
    const big = randomLayer(4096, 4096);
    layers.forEach((layer) => layer.set(big.packed, big.absmax, 4096, 4096, BLOCK));
    time("4096 × 4096, random", layers, layers[0].dequantize(), big.x);
    return holds.every(Boolean);
}

// What a test waits for.
main().then(
    (ok) => (element("status").textContent = ok ? "passed" : "failed"),
    (error) => (element("status").textContent = `failed: ${error}`),
);
