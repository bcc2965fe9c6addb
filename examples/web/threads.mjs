// Threads of the module: workers on a memory that all of them share.

/// Bytes of a thread's stack; the first one's, too, has so many.
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

/// Starts an instance of the module in each worker but the caller's, which has the `exports` of the first.
export async function startThreads(count, module, memory, exports) {
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
