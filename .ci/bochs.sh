# The step for the instruction sets that the machine may not have: a PC in the emulator Bochs, whose processor has AVX-512
# with VNNI and AVX-VNNI, boots Linux and runs tests. QEMU's emulation has no AVX-512.
#
# Bochs 3.0 knows such a processor; Debian 12 has 2.7. So Bochs, a kernel and what makes a CD come from Debian 13 and are
# unpacked into target/bochs/root, where they do not meet the packages of the machine.

bochs=target/bochs
bochs_isas=avx512-vnni,avx-vnni

# bochs_unpack: packages of Debian 13, with all that they depend on, as files.
bochs_unpack() {
    local mirror package kernel packages=(bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso busybox-static)
    rm -rf "$bochs"
    mkdir -p "$bochs"/{lists,cache/archives}/partial "$bochs/root"
    : >"$bochs/status" # nothing is installed there
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$bochs/sources.list"
    cat >"$bochs/apt.conf" <<END
Dir::Etc::SourceList "$PWD/$bochs/sources.list";
Dir::Etc::SourceParts "-";
Dir::State::Lists "$PWD/$bochs/lists";
Dir::State::Status "$PWD/$bochs/status";
Dir::Cache "$PWD/$bochs/cache";
APT::Architectures "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Retries "3";
END
    export APT_CONFIG=$PWD/$bochs/apt.conf
    apt-get update -qq
    apt-get install -qq -y --download-only "${packages[@]}" >/dev/null
    # The kernel alone: its dependencies are for a machine that boots from a disk.
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
    (cd "$bochs/cache/archives" && apt-get download -qq "$kernel")
    for package in "$bochs"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$bochs/root"
    done
    rm -r "$bochs"/{lists,cache}
    touch "$bochs/unpacked"
}

# bochs_programs: the test programs, static, so that they need nothing but a kernel. Prints the path of each.
bochs_programs() {
    CARGO_TARGET_DIR=$bochs/cargo RUSTFLAGS="-C target-feature=+crt-static" \
        cargo test -q --locked --target x86_64-unknown-linux-gnu --no-run --message-format=json \
        --test vectors --test exactness --test reference |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}

# bochs_cd NAME...: a CD that boots Linux, whose first process is `init`, with the programs.
bochs_cd() {
    local root=$bochs/root program name
    rm -rf "$bochs/initramfs" "$root/cd"
    mkdir -p "$bochs"/initramfs/{bin,proc,dev,tmp} "$root/cd/isolinux"
    cp "$root/usr/bin/busybox" "$bochs/initramfs/bin/"
    for program in "$@"; do
        name=$(basename "$program")
        strip -o "$bochs/initramfs/bin/${name%-*}" "$program" # cargo adds a hash to names
    done
    cp -r tests/data/reference "$bochs/initramfs/reference"
    bochs_init >"$bochs/initramfs/init"
    chmod +x "$bochs/initramfs/init"
    (cd "$bochs/initramfs" && find . | ../root/usr/bin/busybox cpio -o -H newc 2>/dev/null) >"$root/cd/initramfs"
    cp "$root"/boot/vmlinuz-* "$root/cd/vmlinuz"
    cp "$root/usr/lib/ISOLINUX/isolinux.bin" "$root/usr/lib/syslinux/modules/bios/ldlinux.c32" "$root/cd/isolinux/"
    # no5lvl: Bochs' system management mode panics with five levels of page tables. clearcpuid: without these the kernel
    # hangs (fsrm) or faults while it sizes the registers' state (amx_tile).
    cat >"$root/cd/isolinux/isolinux.cfg" <<'END'
default linux
label linux
    kernel /vmlinuz
    append initrd=/initramfs console=ttyS0,115200 quiet panic=-1 mitigations=off no5lvl clearcpuid=fsrm,amx_tile
END
    chroot "$root" /usr/bin/xorriso -as mkisofs -quiet -o /cd.iso -b isolinux/isolinux.bin -c isolinux/boot.cat \
        -no-emul-boot -boot-load-size 4 -boot-info-table /cd
}

# The first process. Every command says its status. The last line says whether all was as it should be: the tests pass,
# and fail where the reference data is wrong (a byte of a dequantized weight) or an instruction set missing. Emulated, a second
# takes a minute.
bochs_init() {
    cat <<END
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
export NF4_REQUIRE_ISA=$bochs_isas NF4_REFERENCE=/reference NF4_EVERY=13 RUST_BACKTRACE=0
END
    cat <<'END'
status=0
passes() {
    "$@"
    result=$?
    echo "# $* = $result, after $(/bin/busybox cut -d ' ' -f 1 /proc/uptime) s"
    [ $result = 0 ] || status=1
}
fails() {
    if "$@" >/tmp/log 2>&1; then
        echo "# $* passed, and should have failed"
        status=1
    fi
}
passes /bin/vectors --nocapture
# What these instruction sets do themselves; the rest of their tables is that of AVX2.
passes /bin/exactness --nocapture --test-threads 1 required products_are over_all_panels
passes /bin/reference --nocapture --test-threads 1 linear4bit
NF4_REQUIRE_ISA=none-such fails /bin/exactness required_isas_are_present
printf x | /bin/busybox dd of=/reference/linear4bit/bf16_dq_f32compute/io.safetensors bs=1 seek=20000 conv=notrunc 2>/tmp/log
fails /bin/reference linear4bit
echo "BOCHS-STATUS $status"
/bin/busybox poweroff -f
END
}

bochs_boot() {
    local root=$bochs/root
    cat >"$root/bochsrc" <<'END'
config_interface: textconfig
display_library: rfb, options="timeout=0"
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=sapphire_rapids, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=512, host=512
ata0-master: type=cdrom, path=/cd.iso, status=inserted
boot: cdrom
clock: sync=none
com1: enabled=1, mode=file, dev=/serial.txt
log: /bochs.log
END
    echo c >"$root/commands" # the debugger continues
    : >"$root/serial.txt"
    # It always exits with 1.
    timeout 1800 env -i "$(command -v chroot)" "$root" /usr/bin/bochs-bin -q -f /bochsrc -rc /commands \
        </dev/null &>"$bochs/output" || true
}

check_bochs() {
    local programs
    needs binutils
    [[ -e $bochs/unpacked ]] || bochs_unpack
    programs=$(bochs_programs)
    [[ $(wc -l <<<"$programs") == 3 ]]
    mapfile -t programs <<<"$programs"
    bochs_cd "${programs[@]}"
    bochs_boot
    cat "$bochs/root/serial.txt"
    grep -q '^BOCHS-STATUS 0' "$bochs/root/serial.txt"
}

# The loops are those of Debian's compiler; see the script.
check_assembly() {
    needs rustc-web rust-web-src lld binutils llvm-19 python3 libstd-rust-web-dev:arm64 binutils-aarch64-linux-gnu
    python3 .ci/assembly.py
}
