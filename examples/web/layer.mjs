// What a page needs to run an NF4 layer: a reader of safetensors, and the layer in WebAssembly. Works in Node too.

/// The tensors of a safetensors file: { name: { shape, values } }, of the types that the layer's file has.
export function readTensors(buffer) {
    const types = { U8: Uint8Array, F32: Float32Array, F64: Float64Array };
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
    const tensors = {};
    for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
        const type = types[dtype];
        if (type) {
            const [start, end] = data_offsets.map((offset) => 8 + length + offset);
            // A copy, for typed arrays must be aligned.
            tensors[name] = { shape, values: new type(buffer.slice(start, end)) };
        }
    }
    return tensors;
}

/// A layer in the memory of a WebAssembly module.
export class Layer {
    #wasm;

    /// `source`: the module's bytes, or the response that brings them.
    static async load(source) {
        const { instance } =
            source instanceof Response
                ? await WebAssembly.instantiateStreaming(source)
                : await WebAssembly.instantiate(source);
        const layer = new Layer();
        layer.#wasm = instance.exports;
        return layer;
    }

    get isa() {
        return this.#wasm.is_simd() ? "simd128" : "scalar";
    }

    /// Takes a row-major matrix of `rows` x `cols` weights: two codes a byte, one absmax for each `blockSize` weights.
    set(packed, absmax, rows, cols, blockSize) {
        const wasm = this.#wasm;
        if (!wasm.resize(rows, cols, blockSize)) {
            throw new RangeError(`no layer has ${rows} x ${cols} weights in blocks of ${blockSize}`);
        }
        Object.assign(this, { rows, cols });
        const memory = wasm.memory.buffer;
        if (packed.length !== Math.ceil((rows * cols) / 2) || absmax.length !== Math.ceil((rows * cols) / blockSize)) {
            throw new RangeError("packed codes or absmax have another length than the shape needs");
        }
        new Uint8Array(memory, wasm.packed(), packed.length).set(packed);
        new Float32Array(memory, wasm.absmax(), absmax.length).set(absmax);
        this.#view();
    }

    /// The product with a vector, as a view that the next product overwrites.
    forward(x) {
        this.inputs.set(x);
        if (!this.#wasm.forward()) {
            throw new RangeError("the layer has no matrix");
        }
        return this.outputs;
    }

    /// The weights as f32, row-major.
    dequantize() {
        const address = this.#wasm.dequantize();
        const weights = new Float32Array(this.#wasm.memory.buffer, address, this.rows * this.cols).slice();
        this.#view();
        return weights;
    }

    #view() {
        const { memory, inputs, outputs } = this.#wasm;
        this.inputs = new Float32Array(memory.buffer, inputs(), this.cols);
        this.outputs = new Float32Array(memory.buffer, outputs(), this.rows);
    }
}

/// The same product in JavaScript on f32 weights. Four sums, for one would wait for each addition.
export function plainProduct(weights, x, y) {
    const n = x.length;
    for (let r = 0; r < y.length; r++) {
        let [a, b, c, d] = [0, 0, 0, 0];
        for (let i = r * n, j = 0; j < n; i += 4, j += 4) {
            a += weights[i] * x[j];
            b += weights[i + 1] * x[j + 1];
            c += weights[i + 2] * x[j + 2];
            d += weights[i + 3] * x[j + 3];
        }
        y[r] = a + b + (c + d);
    }
    return y;
}

/// The median time of a call in nanoseconds. Clocks in a browser are coarse, so a sample is at least `sampleMs` long.
export function medianTime(call, { samples = 41, sampleMs = 4 } = {}) {
    let repeats = 1;
    const sample = () => {
        const start = performance.now();
        for (let i = 0; i < repeats; i++) {
            call();
        }
        return performance.now() - start;
    };
    // This also gives the engine time to optimize.
    while (sample() < sampleMs) {
        repeats *= 2;
    }
    const times = Array.from({ length: samples }, sample).sort((a, b) => a - b);
    return (times[samples >> 1] / repeats) * 1e6;
}

/// How often each of the sixteen codes occurs.
export function histogram(packed) {
    const counts = new Array(16).fill(0);
    for (const byte of packed) {
        counts[byte >> 4]++;
        counts[byte & 15]++;
    }
    return counts;
}

/// The largest difference, relative to the root mean square of what is expected.
export function relativeError(got, expected) {
    const rms = Math.sqrt(expected.reduce((sum, y) => sum + y * y, 0) / expected.length);
    return expected.reduce((most, y, i) => Math.max(most, Math.abs(got[i] - y)), 0) / rms;
}
