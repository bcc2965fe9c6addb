# The steps for firmware, on an emulated Cortex-M4, with Debian's compiler.

# Debian's compiler and linker for the firmware in examples/cortex-m, whose folder has the settings of its target.
use_firmware() {
    needs qemu-system-arm binutils
    use_debian_rust
    export CARGO_TARGET_DIR=$PWD/target/firmware
    export CARGO_TARGET_THUMBV7EM_NONE_EABIHF_LINKER=ld.lld
    export CARGO_TARGET_THUMBV6M_NONE_EABI_LINKER=ld.lld
    export CARGO_TARGET_THUMBV6M_NONE_EABI_RUSTFLAGS="-C link-arg=-Tlink.x"
    cd examples/cortex-m
}

check_cortex_m() {
    local clippy output program image
    use_firmware
    cargo fmt --check
    "$clippy" clippy -q --locked -Zbuild-std=core,alloc --bins -- -D warnings
    "$clippy" clippy -q --locked -Zbuild-std=core,alloc --bin heap --features alloc -- -D warnings
    output=$(timeout 300 cargo run -q --release --locked -Zbuild-std=core,alloc --bin layer) || { echo "$output"; return 1; }
    echo "$output"
    # The promises of the DSP kernels: by which factor, at least, they take fewer instructions than portable code.
    fewer_instructions " instructions: " 2.5 <<<"$output"
    fewer_instructions " instructions of 8x8: " 1.9 <<<"$output"
    timeout 300 cargo run -q --release --locked -Zbuild-std=core,alloc --features alloc --bin heap
    for program in layer heap; do
        image=$CARGO_TARGET_DIR/thumbv7em-none-eabihf/release/$program
        echo "$program: $(flash_and_ram "$image" | cut -d ' ' -f 1) bytes of flash, the layer and the printing included"
    done
}

# fewer_instructions WHAT TIMES: compares what the lines with WHAT count for `gemv`.
fewer_instructions() {
    awk -v what="$1" -v times="$2" '
        index($0, what) { for (i = 1; i < NF; i++) if ($i == "gemv") count[$2] = $(i + 1) }
        END {
            if (!count["cortex-m-dsp"]) { print what "of cortex-m-dsp were not counted"; exit 1 }
            ratio = count["scalar"] / count["cortex-m-dsp"]
            printf "%s scalar takes %.2f times those of cortex-m-dsp\n", what, ratio
            exit !(ratio >= times)
        }'
}

# What multiplies in a firmware: sizes, and that nothing of it can panic.
check_sizes() {
    local clippy target profile image
    use_firmware
    # That the check below would find something: firmware that prints can panic.
    cargo build -q --release --locked -Zbuild-std=core,alloc --bin layer
    panics "$CARGO_TARGET_DIR/thumbv7em-none-eabihf/release/layer" >/dev/null || { echo "panics are not found"; return 1; }

    printf '%-22s %-8s %8s %8s %10s %8s\n' target profile kernels tables "all flash" RAM
    for target in thumbv7em-none-eabihf thumbv6m-none-eabi; do
        for profile in release small; do
            cargo build -q --profile "$profile" --locked -Zbuild-std=core,alloc --target "$target" --bin gemv
            image=$CARGO_TARGET_DIR/$target/$profile/gemv
            if panics "$image"; then
                echo "$image can panic"
                return 1
            fi
            sizes "$image" "$target" "$profile"
        done
    done
    echo "bytes; flash without the matrix, RAM without inputs, outputs and stack; small is opt-level s; nothing can panic"
}

# panics IMAGE: the symbols of panics in it, if there are any.
panics() {
    nm -C "$1" | grep -E 'core::panicking|slice_index_fail|rust_begin_unwind|unwrap_failed|expect_failed'
}

# flash_and_ram IMAGE: both in bytes, without the stack.
flash_and_ram() {
    size -A -d "$1" | awk '
        /^\.(vector_table|text|rodata|data) / { flash += $2 }
        /^\.(data|bss|uninit) / { ram += $2 }
        END { print flash, ram }'
}

# sizes IMAGE TARGET PROFILE: a line of the table.
sizes() {
    nm -C -S -t d "$1" | awk -v target="$2" -v profile="$3" -v image="$(flash_and_ram "$1")" '
        { size = $2 + 0; type = $3; name = $4 }
        name ~ /^nf4_kernels::|^<nf4_kernels::|^gemv::product$/ && type ~ /^[tT]$/ { code += size }
        name ~ /^nf4_kernels::/ && type ~ /^[rR]$/ { tables += size }
        name ~ /^gemv::(PACKED|ABSMAX)$/ { matrix += size }
        name ~ /^gemv::.*::(X|Y)$/ { vectors += size }
        name ~ /^gemv::.*::X$/ { matrix += size }
        END {
            split(image, part, " ")
            printf "%-22s %-8s %8d %8d %10d %8d\n", target, profile, code, tables, part[1] - matrix, part[2] - vectors
        }'
}
