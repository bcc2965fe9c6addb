The inner loops of the 16x4 products on avx-vnni, by rustc 1.96.0.

one vector: 64 products

1:
    cmp             r,0x80
    je              outside
    vmovdqu         ymm0,YMMWORD PTR [memory]
    vpsrlw          ymm1,ymm0,0x4
    vpand           ymm1,ymm13,ymm1
    vpshufb         ymm2,ymm8,ymm1
    vpshufb         ymm1,ymm9,ymm1
    vpand           ymm0,ymm13,ymm0
    vpshufb         ymm3,ymm8,ymm0
    vpshufb         ymm0,ymm9,ymm0
    vpunpckhbw      ymm4,ymm3,ymm0
    vpunpcklbw      ymm0,ymm3,ymm0
    vpunpckhbw      ymm3,ymm2,ymm1
    vpunpcklbw      ymm1,ymm2,ymm1
    vpmaddwd        ymm1,ymm1,YMMWORD PTR [stack]
    vmovaps         ymm2,YMMWORD PTR [stack]
    vmovaps         ymm5,YMMWORD PTR [stack]
    vmovaps         ymm6,YMMWORD PTR [stack]
    {vex} vpdpwssd  ymm1,ymm2,ymm3
    {vex} vpdpwssd  ymm1,ymm5,ymm0
    {vex} vpdpwssd  ymm1,ymm6,ymm4
    vcvtdq2ps       ymm0,ymm1
    vbroadcastss    ymm1,DWORD PTR [memory]
    vmulps          ymm0,ymm1,ymm0
    vaddps          ymm15,ymm15,ymm0
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
    vmovdqu         ymm11,YMMWORD PTR [memory]
    vmovups         ymm10,YMMWORD PTR [memory]
    vmovups         ymm9,YMMWORD PTR [memory]
    vmovups         ymm8,YMMWORD PTR [memory]
    vpmaddwd        ymm12,ymm11,YMMWORD PTR [memory]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    vmovaps         ymm15,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm12,ymm10,ymm13
    {vex} vpdpwssd  ymm12,ymm9,ymm14
    {vex} vpdpwssd  ymm12,ymm8,ymm15
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm7,ymm12,ymm7
    vpmaddwd        ymm12,ymm11,YMMWORD PTR [memory]
    lea             r,[stack]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    vmovaps         ymm15,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm12,ymm10,ymm13
    {vex} vpdpwssd  ymm12,ymm9,ymm14
    {vex} vpdpwssd  ymm12,ymm8,ymm15
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm6,ymm12,ymm6
    lea             r,[stack]
    vpmaddwd        ymm12,ymm11,YMMWORD PTR [memory]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    vmovaps         ymm15,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm12,ymm10,ymm13
    {vex} vpdpwssd  ymm12,ymm9,ymm14
    {vex} vpdpwssd  ymm12,ymm8,ymm15
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm5,ymm12,ymm5
    lea             r,[stack]
    vpmaddwd        ymm12,ymm11,YMMWORD PTR [memory]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    vmovaps         ymm15,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm12,ymm10,ymm13
    {vex} vpdpwssd  ymm12,ymm9,ymm14
    {vex} vpdpwssd  ymm12,ymm8,ymm15
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm4,ymm12,ymm4
    lea             r,[stack]
    vpmaddwd        ymm12,ymm11,YMMWORD PTR [memory]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    vmovaps         ymm15,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm12,ymm10,ymm13
    {vex} vpdpwssd  ymm12,ymm9,ymm14
    {vex} vpdpwssd  ymm12,ymm8,ymm15
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm3,ymm12,ymm3
    vpmaddwd        ymm12,ymm11,YMMWORD PTR [memory]
    lea             r,[stack]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    vmovaps         ymm15,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm12,ymm10,ymm13
    {vex} vpdpwssd  ymm12,ymm9,ymm14
    {vex} vpdpwssd  ymm12,ymm8,ymm15
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm2,ymm12,ymm2
    lea             r,[stack]
    vpmaddwd        ymm12,ymm11,YMMWORD PTR [memory]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    vmovaps         ymm15,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm12,ymm10,ymm13
    {vex} vpdpwssd  ymm12,ymm9,ymm14
    {vex} vpdpwssd  ymm12,ymm8,ymm15
    vcvtdq2ps       ymm12,ymm12
    vbroadcastss    ymm13,DWORD PTR [memory]
    vmulps          ymm12,ymm13,ymm12
    vaddps          ymm1,ymm12,ymm1
    lea             r,[stack]
    vpmaddwd        ymm11,ymm11,YMMWORD PTR [memory]
    vmovaps         ymm12,YMMWORD PTR [memory]
    vmovaps         ymm13,YMMWORD PTR [memory]
    vmovaps         ymm14,YMMWORD PTR [memory]
    {vex} vpdpwssd  ymm11,ymm10,ymm12
    {vex} vpdpwssd  ymm11,ymm9,ymm13
    {vex} vpdpwssd  ymm11,ymm8,ymm14
    vcvtdq2ps       ymm8,ymm11
    vbroadcastss    ymm9,DWORD PTR [memory]
    vmulps          ymm8,ymm9,ymm8
    vaddps          ymm0,ymm8,ymm0
    add             r,0x20
    add             r,constant
    cmp             r,r
    jne             1b
