The inner loops of the 16x4 products on avx512-vnni, by rustc 1.96.0.

one vector: 256 products

1:
    test            r,0x1
    jne             inside
    mov             r,QWORD PTR [stack]
    prefetcht0      BYTE PTR [memory]
    mov             r,QWORD PTR [stack]
    prefetcht0      BYTE PTR [memory]
    prefetcht0      BYTE PTR [memory]
    prefetcht0      BYTE PTR [memory]
    lea             r,[memory]
    cmp             r,r
    jae             outside
    cmp             r,0x80
    je              outside
    vmovdqu         ymm0,YMMWORD PTR [memory]
    vinserti64x4    zmm0,zmm0,YMMWORD PTR [memory],0x1
    vpunpcklbw      zmm1,zmm0,zmm0
    vpunpckhbw      zmm0,zmm0,zmm0
    vpsrlw          zmm2,zmm1,0x4
    vpsrlw          zmm3,zmm0,0x4
    vpermw          zmm2,zmm2,zmm10
    vpermw          zmm3,zmm3,zmm10
    vpermw          zmm1,zmm1,zmm10
    vpermw          zmm0,zmm0,zmm10
    vbroadcasti64x4 zmm4,YMMWORD PTR [memory]
    vpmaddwd        zmm2,zmm2,zmm4
    vbroadcastf64x4 zmm5,YMMWORD PTR [memory]
    vbroadcastf64x4 zmm6,YMMWORD PTR [memory]
    vpdpwssd        zmm2,zmm3,zmm5
    vpdpwssd        zmm2,zmm1,zmm6
    vbroadcastf64x4 zmm1,YMMWORD PTR [memory]
    vpdpwssd        zmm2,zmm0,zmm1
    vmovss          xmm0,DWORD PTR [stack]
    vmovss          xmm3,DWORD PTR [stack]
    vmovss          xmm7,DWORD PTR [stack]
    vmovss          xmm8,DWORD PTR [stack]
    vpermt2ps       zmm0,zmm12,zmm3
    vcvtdq2ps       zmm2,zmm2
    vmulps          zmm0,zmm0,zmm2
    vaddps          zmm14,zmm14,zmm0
    vmovdqu         ymm0,YMMWORD PTR [memory]
    vinserti64x4    zmm0,zmm0,YMMWORD PTR [memory],0x1
    vpunpcklbw      zmm2,zmm0,zmm0
    vpunpckhbw      zmm0,zmm0,zmm0
    vpsrlw          zmm3,zmm2,0x4
    vpsrlw          zmm9,zmm0,0x4
    vpermw          zmm3,zmm3,zmm10
    vpermw          zmm9,zmm9,zmm10
    vpermw          zmm2,zmm2,zmm10
    vpermw          zmm0,zmm0,zmm10
    vpmaddwd        zmm3,zmm3,zmm4
    vpdpwssd        zmm3,zmm9,zmm5
    vpdpwssd        zmm3,zmm2,zmm6
    vpdpwssd        zmm3,zmm0,zmm1
    vpermt2ps       zmm7,zmm12,zmm8
    vcvtdq2ps       zmm0,zmm3
    vmulps          zmm0,zmm7,zmm0
    vaddps          zmm13,zmm13,zmm0
    add             r,0x4
    sub             r,constant
    inc             r
    cmp             r,r
    jne             1b

batch: 2048 products

1:
    cmp             QWORD PTR [stack],r
    je              outside
    prefetcht0      BYTE PTR [memory]
    prefetcht0      BYTE PTR [memory]
    sub             r,0x1
    jb              outside
    vmovaps         zmm16,ZMMWORD PTR [memory]
    vmovaps         zmm20,ZMMWORD PTR [memory]
    vbroadcastss    zmm18,DWORD PTR [memory]
    prefetcht0      BYTE PTR [memory]
    prefetcht0      BYTE PTR [memory]
    vmulps          zmm17,zmm18,zmm20
    vmulps          zmm19,zmm16,zmm18
    vbroadcastss    zmm21,DWORD PTR [memory]
    vmulps          zmm18,zmm16,zmm21
    vmulps          zmm16,zmm20,zmm21
    vpbroadcastd    zmm20,DWORD PTR [memory]
    vpbroadcastd    zmm21,DWORD PTR [stack]
    vmovdqa64       zmm22,ZMMWORD PTR [memory]
    vmovdqa64       zmm23,ZMMWORD PTR [memory]
    vpmaddwd        zmm24,zmm22,zmm21
    vpmaddwd        zmm22,zmm22,zmm20
    vpmaddwd        zmm21,zmm23,zmm21
    vpmaddwd        zmm20,zmm23,zmm20
    vbroadcastss    zmm23,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm24,zmm25,zmm23
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm23
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm23,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm24,zmm25,zmm23
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm23
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm23,DWORD PTR [memory]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm20,zmm25,zmm23
    vbroadcastss    zmm26,DWORD PTR [stack]
    vpdpwssd        zmm21,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm23
    vpdpwssd        zmm24,zmm25,zmm26
    vcvtdq2ps       zmm23,zmm24
    vmulps          zmm23,zmm19,zmm23
    vaddps          zmm15,zmm15,zmm23
    vcvtdq2ps       zmm21,zmm21
    vmulps          zmm21,zmm17,zmm21
    vaddps          zmm14,zmm21,zmm14
    vcvtdq2ps       zmm21,zmm22
    vmulps          zmm21,zmm18,zmm21
    vaddps          zmm13,zmm21,zmm13
    vcvtdq2ps       zmm20,zmm20
    vmulps          zmm20,zmm16,zmm20
    vaddps          zmm12,zmm20,zmm12
    vpbroadcastd    zmm20,DWORD PTR [memory]
    vpbroadcastd    zmm21,DWORD PTR [stack]
    vmovdqa64       zmm22,ZMMWORD PTR [memory]
    vpmaddwd        zmm23,zmm22,zmm21
    vpmaddwd        zmm22,zmm22,zmm20
    vmovdqa64       zmm24,ZMMWORD PTR [memory]
    vpmaddwd        zmm21,zmm24,zmm21
    vpmaddwd        zmm20,zmm24,zmm20
    vbroadcastss    zmm24,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm23,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm24
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm24,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm23,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm24
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm24,DWORD PTR [memory]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm20,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [stack]
    vpdpwssd        zmm21,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm24
    vpdpwssd        zmm23,zmm25,zmm26
    vcvtdq2ps       zmm23,zmm23
    vmulps          zmm23,zmm19,zmm23
    vaddps          zmm11,zmm11,zmm23
    vcvtdq2ps       zmm21,zmm21
    vmulps          zmm21,zmm17,zmm21
    vaddps          zmm10,zmm21,zmm10
    vcvtdq2ps       zmm21,zmm22
    vmulps          zmm21,zmm18,zmm21
    vaddps          zmm9,zmm21,zmm9
    vcvtdq2ps       zmm20,zmm20
    vmulps          zmm20,zmm16,zmm20
    vaddps          zmm8,zmm20,zmm8
    vpbroadcastd    zmm20,DWORD PTR [memory]
    vpbroadcastd    zmm21,DWORD PTR [stack]
    vmovdqa64       zmm22,ZMMWORD PTR [memory]
    vpmaddwd        zmm23,zmm22,zmm21
    vpmaddwd        zmm22,zmm22,zmm20
    vmovdqa64       zmm24,ZMMWORD PTR [memory]
    vpmaddwd        zmm21,zmm24,zmm21
    vpmaddwd        zmm20,zmm24,zmm20
    vbroadcastss    zmm24,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm23,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm24
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm24,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm23,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm24
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm24,DWORD PTR [memory]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm20,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [stack]
    vpdpwssd        zmm21,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm24
    vpdpwssd        zmm23,zmm25,zmm26
    vcvtdq2ps       zmm23,zmm23
    vmulps          zmm23,zmm19,zmm23
    vaddps          zmm7,zmm7,zmm23
    vcvtdq2ps       zmm21,zmm21
    vmulps          zmm21,zmm17,zmm21
    vaddps          zmm6,zmm21,zmm6
    vcvtdq2ps       zmm21,zmm22
    vmulps          zmm21,zmm18,zmm21
    vaddps          zmm5,zmm21,zmm5
    vcvtdq2ps       zmm20,zmm20
    vmulps          zmm20,zmm16,zmm20
    vaddps          zmm4,zmm20,zmm4
    vpbroadcastd    zmm20,DWORD PTR [memory]
    vpbroadcastd    zmm21,DWORD PTR [stack]
    vmovdqa64       zmm22,ZMMWORD PTR [memory]
    vpmaddwd        zmm23,zmm22,zmm21
    vpmaddwd        zmm22,zmm22,zmm20
    vmovdqa64       zmm24,ZMMWORD PTR [memory]
    vpmaddwd        zmm21,zmm24,zmm21
    vpmaddwd        zmm20,zmm24,zmm20
    vbroadcastss    zmm24,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm23,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm24
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm24,DWORD PTR [stack]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm23,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm21,zmm25,zmm24
    vpdpwssd        zmm20,zmm25,zmm26
    vbroadcastss    zmm24,DWORD PTR [memory]
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm20,zmm25,zmm24
    vbroadcastss    zmm26,DWORD PTR [stack]
    vpdpwssd        zmm21,zmm25,zmm26
    vmovaps         zmm25,ZMMWORD PTR [memory]
    vpdpwssd        zmm22,zmm25,zmm24
    vpdpwssd        zmm23,zmm25,zmm26
    vcvtdq2ps       zmm23,zmm23
    vmulps          zmm19,zmm19,zmm23
    vaddps          zmm3,zmm3,zmm19
    vcvtdq2ps       zmm19,zmm21
    vmulps          zmm17,zmm17,zmm19
    vaddps          zmm2,zmm17,zmm2
    vcvtdq2ps       zmm17,zmm22
    vmulps          zmm17,zmm18,zmm17
    vaddps          zmm1,zmm17,zmm1
    vcvtdq2ps       zmm17,zmm20
    vmulps          zmm16,zmm16,zmm17
    vaddps          zmm0,zmm16,zmm0
    sub             r,constant
    add             r,constant
    add             r,0x4
    cmp             r,r
    jne             1b
