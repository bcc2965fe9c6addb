//! All unsafe code: llama.cpp's C interface, and the crate `gemm`, whose function takes pointers.
//!
//! Objects of llama.cpp are made once and live as long as the process; nothing is freed, so no pointer here dangles.

#[cfg(feature = "gemm")]
pub use dense::dense_product;
#[cfg(feature = "llama")]
pub use ggml::{Format, Ggml, ggml_version};

#[cfg(feature = "gemm")]
mod dense {
    use gemm::{Parallelism, gemm};

    /// `outputs` `[batch, rows]` is the product of `inputs` `[batch, cols]` with a row-major `matrix` `[rows, cols]`.
    pub fn dense_product(matrix: &[f32], inputs: &[f32], cols: usize, threads: usize, outputs: &mut [f32]) {
        let (rows, batch) = (matrix.len() / cols, inputs.len() / cols);
        assert!(matrix.len() == rows * cols && inputs.len() == batch * cols && outputs.len() == batch * rows);
        let (row, step) = (rows as isize, cols as isize);
        let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
        let (out, a, b) = (outputs.as_mut_ptr(), matrix.as_ptr(), inputs.as_ptr());
        // SAFETY: the assertion: the strides stay within the slices. Without `read_dst` the first factor is not used.
        unsafe {
            gemm(
                rows,
                batch,
                cols,
                out,
                row,
                1,
                false,
                a,
                1,
                step,
                b,
                step,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

#[cfg(feature = "llama")]
#[allow(clippy::multiple_unsafe_ops_per_block, reason = "calls of C that belong together rely on the same facts")]
mod ggml {
    use core::ffi::{CStr, c_char, c_void};
    use core::ptr::{null, null_mut};

    use anyhow::{Context, Result, ensure};
    use llama_cpp_sys_2 as sys;

    use crate::measure::{BATCHES, Problem};

    /// A 4-bit format of llama.cpp.
    #[derive(Debug, Clone, Copy)]
    pub enum Format {
        Iq4Nl,
        Q4_0,
        Q4K,
    }

    impl Format {
        fn id(self) -> sys::ggml_type {
            match self {
                Self::Iq4Nl => sys::GGML_TYPE_IQ4_NL,
                Self::Q4_0 => sys::GGML_TYPE_Q4_0,
                Self::Q4K => sys::GGML_TYPE_Q4_K,
            }
        }

        /// Bytes for this many weights, in whole rows.
        pub fn buffer(self, len: usize) -> Vec<u8> {
            // SAFETY: it takes any type and length.
            vec![0; unsafe { sys::ggml_row_size(self.id(), len as i64) }]
        }

        /// Quantizes weights `[rows, cols]` as llama.cpp does without an importance matrix.
        pub fn quantize(self, weights: &[f32], cols: usize, bytes: &mut [u8]) {
            let rows = weights.len() / cols;
            assert!(weights.len() == rows * cols && cols.is_multiple_of(256));
            // SAFETY: it takes any type and length.
            assert_eq!(rows * unsafe { sys::ggml_row_size(self.id(), cols as i64) }, bytes.len());
            let (from, to) = (weights.as_ptr(), bytes.as_mut_ptr().cast());
            // SAFETY: it reads `rows * cols` weights and writes `rows` rows of the size that it told.
            unsafe { sys::ggml_quantize_chunk(self.id(), from, to, 0, rows as i64, cols as i64, null()) };
        }

        /// Restores weights.
        pub fn dequantize(self, bytes: &[u8], weights: &mut [f32]) {
            // SAFETY: it takes any type and length.
            assert_eq!(unsafe { sys::ggml_row_size(self.id(), weights.len() as i64) }, bytes.len());
            // SAFETY: the table of a valid type is static.
            let traits = unsafe { *sys::ggml_get_type_traits(self.id()) };
            let to_float = traits.to_float.expect("a quantized type");
            // SAFETY: both lengths were checked.
            unsafe { to_float(bytes.as_ptr().cast(), weights.as_mut_ptr(), weights.len() as i64) };
        }
    }

    /// The version of the library.
    pub fn ggml_version() -> String {
        // SAFETY: it returns a static C string.
        unsafe { CStr::from_ptr(sys::ggml_version()) }.to_string_lossy().into_owned()
    }

    /// Matrices, inputs, and graphs with one product: of each matrix with one vector, of the first with each batch.
    pub struct Ggml {
        backend: sys::ggml_backend_t,
        pool: sys::ggml_threadpool_t,
        rows: usize,
        products: Vec<Product>,
        last: *mut sys::ggml_tensor,
    }

    struct Product {
        matrix: usize,
        batch: usize,
        graph: *mut sys::ggml_cgraph,
        output: *mut sys::ggml_tensor,
    }

    impl Ggml {
        /// `quantized` in `copies` matrices, repacked if asked to, on the CPU with the threads of `problem`.
        pub fn new(problem: &Problem, format: Format, quantized: &[u8], copies: usize, repack: bool) -> Result<Self> {
            let Problem { rows, cols, threads, .. } = *problem;
            // SAFETY: the function takes what it is called with.
            unsafe { sys::ggml_log_set(Some(no_log), null_mut()) };
            // SAFETY: it only makes an object.
            let backend = unsafe { sys::ggml_backend_cpu_init() };
            ensure!(!backend.is_null(), "no CPU backend");
            // SAFETY: the parameters are a plain struct that the call before filled.
            let pool = unsafe {
                let mut params = sys::ggml_threadpool_params_default(threads as i32);
                sys::ggml_threadpool_new(&mut params)
            };
            ensure!(!pool.is_null(), "no thread pool");
            // SAFETY: both objects exist, and the backend is one of the CPU.
            unsafe {
                sys::ggml_backend_cpu_set_n_threads(backend, threads as i32);
                sys::ggml_backend_cpu_set_threadpool(backend, pool);
            }
            let buffers = if repack { repack_buffers(backend)? } else { host_buffers() };
            let context = context(copies + BATCHES.len() + copies + BATCHES.len(), copies + BATCHES.len());
            let weights_context = self::context(copies, 0);
            let matrices = (0..copies)
                // SAFETY: the context has room for the tensors that it was made for.
                .map(|_| unsafe { sys::ggml_new_tensor_2d(weights_context, format.id(), cols as i64, rows as i64) })
                .collect::<Vec<_>>();
            // SAFETY: context and buffer type exist.
            let buffer = unsafe { sys::ggml_backend_alloc_ctx_tensors_from_buft(weights_context, buffers) };
            ensure!(!buffer.is_null(), "no memory for the matrices");
            for matrix in &matrices {
                // SAFETY: the tensor has memory, and its size is checked.
                unsafe {
                    assert_eq!(sys::ggml_nbytes(*matrix), quantized.len());
                    sys::ggml_backend_tensor_set(*matrix, quantized.as_ptr().cast(), 0, quantized.len());
                }
            }
            let inputs = BATCHES
                // SAFETY: the context has room for the tensors that it was made for.
                .map(|n| unsafe { sys::ggml_new_tensor_2d(context, sys::GGML_TYPE_F32, cols as i64, n as i64) });
            let mut products = Vec::new();
            for (matrix, tensor) in matrices.into_iter().enumerate() {
                for (&batch, &input) in BATCHES.iter().zip(&inputs).take(if matrix == 0 { BATCHES.len() } else { 1 }) {
                    // SAFETY: shapes fit; the context has room for the tensors and graphs that it was made for.
                    let (output, graph) = unsafe {
                        let output = sys::ggml_mul_mat(context, tensor, input);
                        let graph = sys::ggml_new_graph_custom(context, GRAPH, false);
                        sys::ggml_build_forward_expand(graph, output);
                        (output, graph)
                    };
                    products.push(Product { matrix, batch, graph, output });
                }
            }
            // SAFETY: context and backend exist.
            let buffer = unsafe { sys::ggml_backend_alloc_ctx_tensors(context, backend) };
            ensure!(!buffer.is_null(), "no memory for inputs and outputs");
            for (batch, tensor) in BATCHES.into_iter().zip(inputs) {
                let values = problem.inputs(batch);
                // SAFETY: the tensor has memory, for `batch * cols` f32 values as `values` has.
                unsafe { sys::ggml_backend_tensor_set(tensor, values.as_ptr().cast(), 0, size_of_val(values)) };
            }
            let output = products[0].output;
            // SAFETY: backend and tensor exist.
            let supported = unsafe { sys::ggml_backend_dev_supports_op(sys::ggml_backend_get_device(backend), output) };
            ensure!(supported, "not supported for this format and CPU");
            Ok(Self { backend, pool, rows, products, last: null_mut() })
        }

        pub fn compute(&mut self, matrix: usize, batch: usize) {
            let product = self.products.iter().find(|p| p.matrix == matrix && p.batch == batch);
            let product = product.expect("a product that was prepared");
            // SAFETY: backend and graph exist, and all tensors have memory.
            let status = unsafe { sys::ggml_backend_graph_compute(self.backend, product.graph) };
            assert_eq!(status, sys::GGML_STATUS_SUCCESS);
            self.last = product.output;
        }

        /// The last product, `[batch, rows]`.
        pub fn read_output(&self, batch: usize) -> Vec<f32> {
            let mut values = vec![0.0_f32; batch * self.rows];
            assert!(!self.last.is_null());
            // SAFETY: the tensor exists and has memory; its size is checked.
            unsafe {
                assert_eq!(sys::ggml_nbytes(self.last), size_of_val(&values[..]));
                sys::ggml_backend_tensor_get(self.last, values.as_mut_ptr().cast(), 0, size_of_val(&values[..]));
            }
            values
        }

        /// Lets the threads sleep; the next product wakes them.
        pub fn pause(&mut self) {
            // SAFETY: the pool exists.
            unsafe { sys::ggml_threadpool_pause(self.pool) };
        }
    }

    /// Nodes that a graph has room for.
    const GRAPH: usize = 8;

    /// A context with room for this many tensors and graphs, without their data.
    fn context(tensors: usize, graphs: usize) -> *mut sys::ggml_context {
        // SAFETY: these only tell sizes.
        let sizes = unsafe { [sys::ggml_tensor_overhead(), sys::ggml_graph_overhead_custom(GRAPH, false)] };
        let mem_size = (tensors + 1) * sizes[0] + (graphs + 1) * sizes[1];
        let parameters = sys::ggml_init_params { mem_size, mem_buffer: null_mut(), no_alloc: true };
        // SAFETY: it allocates the memory itself.
        let context = unsafe { sys::ggml_init(parameters) };
        assert!(!context.is_null());
        context
    }

    extern "C" fn no_log(_: sys::ggml_log_level, _: *const c_char, _: *mut c_void) {}

    fn host_buffers() -> sys::ggml_backend_buffer_type_t {
        // SAFETY: it returns a static object.
        unsafe { sys::ggml_backend_cpu_buffer_type() }
    }

    /// The buffers that repack what is written to them, found as llama.cpp does when it loads a model.
    fn repack_buffers(backend: sys::ggml_backend_t) -> Result<sys::ggml_backend_buffer_type_t> {
        // SAFETY: backend, device and registry exist.
        let (device, function) = unsafe {
            let device = sys::ggml_backend_get_device(backend);
            let registry = sys::ggml_backend_dev_backend_reg(device);
            (device, sys::ggml_backend_reg_get_proc_address(registry, c"ggml_backend_dev_get_extra_bufts".as_ptr()))
        };
        ensure!(!function.is_null(), "the library does not tell of buffers that repack");
        // SAFETY: the function of this name has this type, `ggml_backend_dev_get_extra_bufts_t`.
        let function = unsafe {
            core::mem::transmute::<
                *mut c_void,
                unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t,
            >(function)
        };
        // SAFETY: the result is an array of static objects that ends with a null pointer; names are C strings.
        let found = unsafe {
            let mut types = function(device);
            while !types.is_null() && !(*types).is_null() {
                if CStr::from_ptr(sys::ggml_backend_buft_name(*types)) == c"CPU_REPACK" {
                    break;
                }
                types = types.add(1);
            }
            (!types.is_null() && !(*types).is_null()).then(|| *types)
        };
        found.context("the library was built without repacking")
    }
}
