//! A file mapped into memory.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// Maps a file for reading.
///
/// As for every reader of mapped weights, the file must not change while it is in use: a shorter file ends the program
/// with a signal, another content gives other results.
#[expect(unsafe_code, reason = "the only way to map a file")]
pub(crate) fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: nothing in this program writes to the file, and that nobody else does is said above.
    unsafe { Mmap::map(&file) }
}
