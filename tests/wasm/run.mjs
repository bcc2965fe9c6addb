// Runs a program for wasm32-wasip1 in Node, for cargo to call as
// CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings tests/wasm/run.mjs". The program sees the file system and the
// environment as they are here, and its exit status becomes that of Node.

import { readFile } from "node:fs/promises";
import process, { argv, cwd, env } from "node:process";
import { WASI } from "node:wasi";

// The standard library names these functions of the C library, and older ones do not have them. There are no threads.
const threads = Object.fromEntries(
    ["pthread_join", "pthread_detach"].map((name) => [
        name,
        () => {
            throw new Error(name);
        },
    ]),
);

const [, , program, ...args] = argv;
const wasi = new WASI({
    version: "preview1",
    args: [program, ...args],
    env: { ...env, PWD: cwd() },
    preopens: { "/": "/" },
    returnOnExit: true,
});
const module = await WebAssembly.compile(await readFile(program));
const instance = await WebAssembly.instantiate(module, { ...wasi.getImportObject(), env: threads });
// Node is left to end by itself: `exit` while it still compiles the program in the background has ended in a segmentation
// fault, after all tests had passed.
try {
    process.exitCode = wasi.start(instance);
} catch (trap) {
    // A panic ends in the instruction `unreachable`; what it had to say is on standard error already.
    console.error(trap);
    process.exitCode = 101;
}
