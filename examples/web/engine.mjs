// The model in a WebAssembly module: requests and answers are texts in its memory. Works in Node too.

/// The shortest module with an instruction of 128-bit SIMD: a function that drops a vector.
const SIMD_PROBE = Uint8Array.of(
    0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11,
);

export class Engine {
    #wasm;

    /// The fastest module that this browser can run, from the folder of the page.
    static async best() {
        const name = WebAssembly.validate(SIMD_PROBE) ? "nf4-simd128.wasm" : "nf4-scalar.wasm";
        return Engine.load(await WebAssembly.compileStreaming(fetch(name)));
    }

    /// A module that was compiled.
    static async load(module) {
        const { exports } = await WebAssembly.instantiate(module, {});
        return new Engine(exports);
    }

    constructor(exports) {
        this.#wasm = exports;
    }

    /// What the request `{ NAME: ARGUMENTS }` returns. Throws an `Error` with what was wrong.
    request(request) {
        this.#write(new TextEncoder().encode(JSON.stringify(request)));
        this.#wasm.request();
        return this.#answer();
    }

    /// Copies a file into the module, part by part.
    async file(name, blob) {
        this.request({ file: { name, len: blob.size } });
        const reader = blob.stream().getReader();
        for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
            this.#write(value);
            this.#wasm.part();
            this.#answer();
        }
    }

    #write(bytes) {
        const address = this.#wasm.reserve(bytes.length);
        if (!address) {
            throw new RangeError(`no memory for ${bytes.length} bytes in this page`);
        }
        // Made each time: when the memory grows, views of it end.
        new Uint8Array(this.#wasm.memory.buffer, address, bytes.length).set(bytes);
    }

    #answer() {
        const bytes = new Uint8Array(this.#wasm.memory.buffer, this.#wasm.answer(), this.#wasm.answer_len());
        const { ok, error } = JSON.parse(new TextDecoder().decode(bytes));
        if (error !== undefined) {
            throw new Error(error);
        }
        return ok;
    }
}
