// The model in a WebAssembly module: requests and answers are texts in its memory. Works in Node too.

import { sharedMemory, startThreads } from "./threads.mjs";

/// The shortest module with an instruction of 128-bit SIMD: a function that drops a vector.
const SIMD_PROBE = Uint8Array.of(
    0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11,
);

export class Engine {
    #exports;
    #memory;

    /// The fastest module that this browser can run, from the folder of the page, on at most so many threads.
    static async best(threads) {
        const compile = (name) => WebAssembly.compileStreaming(fetch(name));
        if (!WebAssembly.validate(SIMD_PROBE)) {
            return Engine.load(await compile("nf4-scalar.wasm"));
        }
        const memory = threads > 1 && globalThis.crossOriginIsolated ? sharedMemory() : null;
        if (!memory) {
            return Engine.load(await compile("nf4-simd128.wasm"));
        }
        const module = await compile("nf4-threads.wasm");
        const { exports } = await WebAssembly.instantiate(module, { env: { memory } });
        exports.__wasm_init_tls(exports.thread_memory(exports.__tls_size.value));
        const engine = new Engine(exports, memory);
        engine.request({ threads: { count: threads } });
        await startThreads(threads, module, memory, exports);
        return engine;
    }

    /// A module that was compiled, without threads.
    static async load(module) {
        const { exports } = await WebAssembly.instantiate(module, {});
        return new Engine(exports, exports.memory);
    }

    constructor(exports, memory) {
        this.#exports = exports;
        this.#memory = memory;
    }

    /// What the request `{ NAME: ARGUMENTS }` returns. Throws an `Error` with what was wrong.
    request(request) {
        this.#write(new TextEncoder().encode(JSON.stringify(request)));
        this.#exports.request();
        return this.#answer();
    }

    /// Copies a file into the module, part by part.
    async file(name, blob) {
        this.request({ file: { name, len: blob.size } });
        const reader = blob.stream().getReader();
        for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
            this.#write(value);
            this.#exports.part();
            this.#answer();
        }
    }

    #write(bytes) {
        const address = this.#exports.reserve(bytes.length);
        if (!address) {
            throw new RangeError(`no memory for ${bytes.length} bytes in this page`);
        }
        // Made each time: when the memory grows, views of it end.
        new Uint8Array(this.#memory.buffer, address, bytes.length).set(bytes);
    }

    #answer() {
        const bytes = new Uint8Array(this.#memory.buffer, this.#exports.answer(), this.#exports.answer_len());
        // A copy, because browsers decode no text in shared memory.
        const { ok, error } = JSON.parse(new TextDecoder().decode(bytes.slice()));
        if (error !== undefined) {
            throw new Error(error);
        }
        return ok;
    }
}
