The inner loops of the 16x4 products on avx2, by rustc 1.96.0.

one vector: 64 products

1:
    cmp             r,0x80
    je              outside
    vmovdqu         ymm0,YMMWORD PTR [memory]
    vpsrlw          ymm1,ymm0,0x4
    vpand           ymm1,ymm11,ymm1
    vpshufb         ymm2,ymm6,ymm1
    vpshufb         ymm1,ymm7,ymm1
    vpand           ymm0,ymm11,ymm0
    vpshufb         ymm3,ymm6,ymm0
    vpshufb         ymm0,ymm7,ymm0
    vpunpckhbw      ymm4,ymm2,ymm1
    vpunpcklbw      ymm1,ymm2,ymm1
    vpunpckhbw      ymm2,ymm3,ymm0
    vpmaddwd        ymm1,ymm1,YMMWORD PTR [stack]
    vpmaddwd        ymm4,ymm4,YMMWORD PTR [stack]
    vpunpcklbw      ymm0,ymm3,ymm0
    vpaddd          ymm1,ymm4,ymm1
    vpmaddwd        ymm0,ymm0,YMMWORD PTR [stack]
    vpmaddwd        ymm2,ymm2,YMMWORD PTR [stack]
    vpaddd          ymm0,ymm0,ymm2
    vpaddd          ymm0,ymm1,ymm0
    vcvtdq2ps       ymm0,ymm0
    vbroadcastss    ymm1,DWORD PTR [memory]
    vmulps          ymm0,ymm1,ymm0
    vaddps          ymm13,ymm13,ymm0
    inc             r
    add             r,0x4
    add             r,0x20
    cmp             r,r
    jne             1b

batch: 512 products

1:
    lea             r,[stack]
    add             r,0x40
    prefetcht0      BYTE PTR [memory]
    prefetcht0      BYTE PTR [memory]
    vmovdqu         ymm10,YMMWORD PTR [memory]
    vmovdqu         ymm11,YMMWORD PTR [memory]
    vmovdqu         ymm9,YMMWORD PTR [memory]
    vmovdqu         ymm8,YMMWORD PTR [memory]
    vpmaddwd        ymm12,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm13,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm14,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm12,ymm13,ymm12
    vpmaddwd        ymm13,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm13,ymm14,ymm13
    vpaddd          ymm12,ymm12,ymm13
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm7,ymm12,ymm7
    lea             r,[stack]
    vpmaddwd        ymm12,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm13,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm14,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm12,ymm13,ymm12
    vpmaddwd        ymm13,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm13,ymm14,ymm13
    vpaddd          ymm12,ymm12,ymm13
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm6,ymm12,ymm6
    lea             r,[stack]
    vpmaddwd        ymm12,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm13,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm14,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm12,ymm13,ymm12
    vpmaddwd        ymm13,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm13,ymm14,ymm13
    vpaddd          ymm12,ymm12,ymm13
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm5,ymm12,ymm5
    lea             r,[stack]
    vpmaddwd        ymm12,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm13,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm14,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm12,ymm13,ymm12
    vpmaddwd        ymm13,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm13,ymm14,ymm13
    vpaddd          ymm12,ymm12,ymm13
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm4,ymm12,ymm4
    lea             r,[stack]
    vpmaddwd        ymm12,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm13,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm14,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm12,ymm13,ymm12
    vpmaddwd        ymm13,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm13,ymm14,ymm13
    vpaddd          ymm12,ymm12,ymm13
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm3,ymm12,ymm3
    lea             r,[stack]
    vpmaddwd        ymm12,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm13,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm14,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm12,ymm13,ymm12
    vpmaddwd        ymm13,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm13,ymm14,ymm13
    vpaddd          ymm12,ymm12,ymm13
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm2,ymm12,ymm2
    lea             r,[stack]
    vpmaddwd        ymm12,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm13,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm14,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm12,ymm13,ymm12
    vpmaddwd        ymm13,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm13,ymm14,ymm13
    vpaddd          ymm12,ymm12,ymm13
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm1,ymm12,ymm1
    lea             r,[stack]
    vpmaddwd        ymm10,ymm10,YMMWORD PTR [memory]
    vpmaddwd        ymm11,ymm11,YMMWORD PTR [memory]
    vpmaddwd        ymm9,ymm9,YMMWORD PTR [memory]
    vpaddd          ymm10,ymm11,ymm10
    vpmaddwd        ymm8,ymm8,YMMWORD PTR [memory]
    vpaddd          ymm8,ymm9,ymm8
    vpaddd          ymm8,ymm10,ymm8
    vcvtdq2ps       ymm8,ymm8
    vbroadcastss    ymm9,DWORD PTR [memory]
    vmulps          ymm8,ymm9,ymm8
    vaddps          ymm0,ymm8,ymm0
    add             r,0x20
    add             r,constant
    cmp             r,r
    jne             1b
