// A thread of the model: a worker that runs the module on the memory of another.

onmessage = async ({ data: { module, memory, own } }) => {
    const { exports } = await WebAssembly.instantiate(module, { env: { memory } });
    // Before any call: the stack grows down from this address, and thread-local variables begin at it.
    exports.__stack_pointer.value = own;
    exports.__wasm_init_tls(own);
    postMessage("ready");
    exports.thread(); // does not return
};
