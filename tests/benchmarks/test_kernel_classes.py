"""benchmarks.kernel_classes: names as torch.profiler prints them on Ampere and Hopper."""

import pytest

from benchmarks.kernel_classes import KernelClass, device_time, kernel_class, table

ATTENTION = KernelClass.attention
MATMUL = KernelClass.matmul
ELEMENTWISE = KernelClass.norm_elementwise
OPTIMIZER = KernelClass.optimizer
COMMUNICATION = KernelClass.communication

NAMES = {
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4,"
    " false, false, cutlass::bfloat16_t>, false, true>(pytorch_flash::Flash_fwd_params)": ATTENTION,
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": ATTENTION,
    "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, ...>": ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x128": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": ATTENTION,
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": MATMUL,
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": MATMUL,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": MATMUL,
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3>": MATMUL,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": MATMUL,
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>": (
        ELEMENTWISE
    ),
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<...>": ELEMENTWISE,
    "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>": ELEMENTWISE,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<"
    "float, at::native::sum_functor>>>": ELEMENTWISE,
    "triton_poi_fused_add_gelu_0": ELEMENTWISE,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
    "namespace)::FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>": OPTIMIZER,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, NormTwoOps<float>>>": (
        OPTIMIZER
    ),
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": COMMUNICATION,
    "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": COMMUNICATION,
    "Memcpy DtoD (Device -> Device)": KernelClass.memory_copy,
    "Memset (Device)": KernelClass.memory_copy,
    "a_kernel_nobody_knows": KernelClass.other,
}


@pytest.mark.parametrize("name", NAMES)
def test_class_of_a_name(name: str) -> None:
    assert kernel_class(name) is NAMES[name]


def event(name: str, begin: float, duration: float, category: str = "kernel") -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}


def test_overlapping_kernels_count_once_as_busy() -> None:
    time = device_time(
        [
            event("nvjet_tst", 100, 50),
            event("ncclDevKernel_AllReduce", 120, 60),  # 120..180, half of it behind the matmul
            event("Memset (Device)", 200, 10, "gpu_memset"),
            event("aten::mm", 0, 500, "cpu_op"),  # on the host
            {"ph": "i", "cat": "kernel", "name": "marker", "ts": 0},
        ]
    )
    assert time.by_class[MATMUL] == 50
    assert time.by_class[COMMUNICATION] == 60
    assert time.by_class[KernelClass.memory_copy] == 10
    assert (time.span, time.busy, time.idle) == (110, 90, 20)


def test_a_kernel_inside_another_adds_nothing() -> None:
    time = device_time([event("nvjet", 0, 100), event("nccl", 10, 20), event("nccl", 90, 20)])
    assert (time.span, time.busy) == (110, 110)


def test_table_names_classes_and_idle_time() -> None:
    text = table(device_time([event("nvjet_tst", 0, 3000), event("nvjet_tst", 4000, 1000)]), 2)
    assert "matmul" in text
    assert "2.00   80.0%" in text  # 4 ms in two steps, of a span of 5 ms
    assert "idle                      0.50   20.0%" in text


def test_table_of_an_empty_trace() -> None:
    assert table(device_time([]), 1) == "no kernel in the trace"
