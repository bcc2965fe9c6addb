//! Runs generic code for the type that a file or an option names.

/// Evaluates `$body` with `$type` naming the type that `$float`, a `FloatType`, stands for.
macro_rules! with_float {
    ($float:expr, $type:ident => $body:expr) => {
        match $float {
            nf4::checkpoint::FloatType::F32 => {
                type $type = f32;
                $body
            }
            nf4::checkpoint::FloatType::F16 => {
                type $type = nf4::f16;
                $body
            }
            nf4::checkpoint::FloatType::BF16 => {
                type $type = nf4::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_float;
