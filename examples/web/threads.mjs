// Threads of the module: workers, each with an instance of it, on a memory that all of them share.

/// Bytes of a thread's stack, as the linker gives the first.
const STACK = 1 << 20;
/// Pages of 64 KiB that the memory has at first, and may have: build.sh tells the linker the same.
const [INITIAL, MAXIMUM] = [256, 65536];

/// A memory that workers can share, or null where none can be had.
export function sharedMemory() {
    // A browser sets the addresses aside at once, and may have fewer, as on a phone.
    for (let maximum = MAXIMUM; maximum >= MAXIMUM / 8; maximum /= 2) {
        try {
            return new WebAssembly.Memory({ initial: INITIAL, maximum, shared: true });
        } catch {
            // Tries half as many.
        }
    }
    return null;
}

/// The exports of the instance on the caller's thread.
export async function firstThread(module, memory) {
    const { exports } = await WebAssembly.instantiate(module, { env: { memory } });
    // Its stack is in the module; its thread-local variables are there only with newer linkers.
    exports.__wasm_init_tls(exports.thread_memory(exports.__tls_size.value));
    return exports;
}

/// Starts an instance in a worker for each of `count` threads but the first, which has these exports.
export async function otherThreads(count, module, memory, exports) {
    const own = () => exports.thread_memory(STACK + exports.__tls_size.value) + STACK;
    // All have begun before the module is called again: a worker starts only while the one that made it does not wait.
    await Promise.all(Array.from({ length: count - 1 }, () => start({ module, memory, own: own() })));
}

function start(message) {
    return new Promise((resolve, reject) => {
        const worker = new Worker("thread.mjs", { type: "module" });
        worker.onmessage = resolve;
        worker.onerror = ({ message }) => reject(new Error(`a thread did not start: ${message ?? "no thread.mjs"}`));
        worker.postMessage(message);
    });
}
