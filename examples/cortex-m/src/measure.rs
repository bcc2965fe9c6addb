//! What the emulator and the stack tell.

use cortex_m::peripheral::{SYST, syst::SystClkSource};

/// Instructions between two ticks of `SysTick`. The machine clocks it at 25 MHz, a tick in 40 ns, and `-icount shift=0` makes
/// an instruction last one. `Instructions::new` checks it.
const PER_TICK: u32 = 40;

/// Counts instructions, to within [`PER_TICK`].
pub(crate) struct Instructions(());

impl Instructions {
    /// Starts the timer; `None` if it does not count instructions: without `-icount`, or on a real core.
    pub(crate) fn new(mut timer: SYST) -> Option<Self> {
        timer.set_clock_source(SystClkSource::Core);
        timer.set_reload(0x00ff_ffff);
        timer.clear_current();
        timer.enable_counter();
        let instructions = Self(());
        // The loop of `delay` has two instructions, `subs` and `bne`.
        let turns = 100_000;
        let (counted, ()) = instructions.count(|| cortex_m::asm::delay(turns));
        (counted.abs_diff(2 * turns) < 3 * PER_TICK).then_some(instructions)
    }

    pub(crate) fn count<T>(&self, f: impl FnOnce() -> T) -> (u32, T) {
        let start = SYST::get_current();
        let result = f();
        let ticks = start.wrapping_sub(SYST::get_current()) & 0x00ff_ffff;
        (ticks * PER_TICK, result)
    }
}

/// The bytes of stack that `f` needs, and its result.
pub(crate) fn stack<T>(f: impl FnOnce() -> T) -> (u32, T) {
    cortex_m_stack::repaint_stack();
    let before = cortex_m_stack::current_stack_in_use();
    let result = f();
    let high_water = cortex_m_stack::stack_size() - cortex_m_stack::stack_painted();
    (high_water.saturating_sub(before), result)
}
