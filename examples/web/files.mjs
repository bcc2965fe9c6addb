// What was dropped or chosen: the folder of a model, and those of adapters.

/// [path, File] of everything that was dropped, with folders walked through. To be called in the event itself.
export function droppedFiles(transfer) {
    const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    return Promise.all(entries.map((entry) => walk(entry, ""))).then((lists) => lists.flat());
}

async function walk(entry, folder) {
    const path = folder + entry.name;
    if (entry.isFile) {
        return [[path, await new Promise((resolve, reject) => entry.file(resolve, reject))]];
    }
    const reader = entry.createReader();
    const all = [];
    // A reader gives some entries at a time, and none at the end.
    for (;;) {
        const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (some.length === 0) {
            return all;
        }
        for (const child of some) {
            all.push(...(await walk(child, `${path}/`)));
        }
    }
}

/// [path, File] of what was chosen.
export function chosenFiles(list) {
    return [...list].map((file) => [file.webkitRelativePath || file.name, file]);
}

/// Sorts [path, File] by folders: { model, adapters: [{ name, folder }] }, where a folder is { files: { NAME: File } } and
/// `model` null if there is none.
export function sortFolders(files) {
    const folders = new Map();
    for (const [path, file] of files) {
        const cut = path.lastIndexOf("/");
        const [folder, name] = [path.slice(0, Math.max(cut, 0)), path.slice(cut + 1)];
        folders.set(folder, { ...folders.get(folder), [name]: file });
    }
    const sorted = { model: null, adapters: [] };
    for (const [path, files] of folders) {
        if (files["adapter_config.json"] || files["adapter_model.safetensors"]) {
            sorted.adapters.push({ name: path.slice(path.lastIndexOf("/") + 1) || "adapter", folder: { files } });
        } else if (files["config.json"] || Object.keys(files).some((name) => name.endsWith(".safetensors"))) {
            if (sorted.model) {
                throw new Error("these are two models");
            }
            sorted.model = { files };
        }
    }
    if (!sorted.model && sorted.adapters.length === 0) {
        throw new Error("there is no config.json and no adapter_config.json among these files");
    }
    return sorted;
}
