// The model in a WebAssembly module: requests and answers are texts in its memory. Works in Node too.

import { firstThread, otherThreads, sharedMemory } from "./threads.mjs";

/// The shortest module with an instruction of 128-bit SIMD: a function that drops a vector.
const SIMD_PROBE = Uint8Array.of(
    0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11,
);

export class Engine {
    #exports;
    #memory;

    /// The module for this page, from its folder, on this number of threads if the page may have them.
    static async best(threads) {
        if (!WebAssembly.validate(SIMD_PROBE)) {
            throw new Error("this browser has no SIMD in WebAssembly");
        }
        const memory = threads > 1 && globalThis.crossOriginIsolated ? sharedMemory() : null;
        // Not there if it was not built.
        const shared = memory && (await fetch("nf4-threads.wasm"));
        if (shared?.ok) {
            return Engine.#onThreads(threads, await WebAssembly.compileStreaming(shared), memory);
        }
        return Engine.load(await WebAssembly.compileStreaming(fetch("nf4-simd128.wasm")));
    }

    /// A module that was compiled, on one thread.
    static async load(module) {
        const { exports } = await WebAssembly.instantiate(module, {});
        return new Engine(exports, exports.memory);
    }

    static async #onThreads(count, module, memory) {
        const exports = await firstThread(module, memory);
        const engine = new Engine(exports, memory);
        engine.request({ threads: { count } });
        await otherThreads(count, module, memory, exports);
        return engine;
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
