//! Documents side by side in sequences, and the order in which a training sees them.

use std::ops::Range;

use crate::data::Document;

/// One or more documents in a row, of which each is seen alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    tokens: Vec<u32>,
    /// For each token, whether it is one to be learned.
    learned: Vec<bool>,
    /// Where documents end.
    ends: Vec<usize>,
    /// The lines that they came from.
    lines: Vec<usize>,
}

impl Sequence {
    /// The documents of `all` at these places.
    #[must_use]
    pub fn new(all: &[Document], places: &[usize]) -> Self {
        let mut sequence = Self { tokens: Vec::new(), learned: Vec::new(), ends: Vec::new(), lines: Vec::new() };
        for document in places.iter().map(|place| &all[*place]) {
            sequence.tokens.extend(document.tokens());
            sequence.learned.extend(document.learned());
            sequence.ends.push(sequence.tokens.len());
            sequence.lines.push(document.line());
        }
        sequence
    }

    /// All tokens.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Where each document is.
    pub fn documents(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| start..*end)
    }

    /// The lines of the file that the documents came from.
    #[must_use]
    pub fn lines(&self) -> &[usize] {
        &self.lines
    }

    /// The tokens that predict one that is to be learned, by their places, and what they are to predict. The first token of
    /// a document is predicted by none.
    #[must_use]
    pub fn targets(&self) -> (Vec<u32>, Vec<u32>) {
        let places = self.documents().flat_map(|range| (range.start + 1).min(range.end)..range.end);
        let wanted = places.filter(|place| self.learned[*place]);
        wanted.map(|place| (u32::try_from(place - 1).unwrap_or(u32::MAX), self.tokens[place])).unzip()
    }
}

/// Documents in sequences of at most `context` tokens each, in this order as far as that leaves little room unused: a
/// document goes into the first of the last [`OPEN`] sequences that has room for it.
fn pack(documents: &[Document], order: &[usize], context: usize) -> Vec<Vec<usize>> {
    /// Sequences that a document may still be added to.
    const OPEN: usize = 32;
    let mut sequences: Vec<(usize, Vec<usize>)> = Vec::new();
    for &place in order {
        let len = documents[place].tokens().len();
        let first = sequences.len().saturating_sub(OPEN);
        match sequences[first..].iter_mut().find(|(used, _)| used + len <= context) {
            Some((used, places)) => {
                *used += len;
                places.push(place);
            }
            None => sequences.push((len, vec![place])),
        }
    }
    sequences.into_iter().map(|(_, places)| places).collect()
}

/// The sequences of a training, epoch after epoch, each in a new order that the seed and its number decide.
#[derive(Debug)]
pub struct Stream<'a> {
    documents: &'a [Document],
    context: usize,
    seed: u64,
    shuffle: bool,
    epoch: u64,
    /// Those left of the epoch, the next one last.
    left: Vec<Vec<usize>>,
}

impl<'a> Stream<'a> {
    /// The sequences of these documents, of which there must be some, none longer than `context`.
    #[must_use]
    pub fn new(documents: &'a [Document], context: usize, seed: u64, shuffle: bool) -> Self {
        Self { documents, context, seed, shuffle, epoch: 0, left: Vec::new() }
    }

    /// The sequences of one pass in the order of the file.
    #[must_use]
    pub fn once(documents: &'a [Document], context: usize) -> Vec<Sequence> {
        let order: Vec<usize> = (0..documents.len()).collect();
        pack(documents, &order, context).iter().map(|places| Sequence::new(documents, places)).collect()
    }

    /// Sequences of the first epoch.
    #[must_use]
    pub fn per_epoch(&self) -> usize {
        self.epoch_of(0).len()
    }

    fn epoch_of(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.documents.len()).collect();
        if !self.shuffle {
            return pack(self.documents, &order, self.context);
        }
        let mut random = fastrand::Rng::with_seed(self.seed.wrapping_add(epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        random.shuffle(&mut order);
        let mut sequences = pack(self.documents, &order, self.context);
        // Packing puts short documents forward.
        random.shuffle(&mut sequences);
        sequences
    }

    fn next_places(&mut self) -> Vec<usize> {
        if self.left.is_empty() {
            self.left = self.epoch_of(self.epoch);
            self.left.reverse();
            self.epoch += 1;
        }
        self.left.pop().unwrap_or_default()
    }

    /// Leaves out `count` sequences.
    pub fn skip(&mut self, count: usize) {
        for _ in 0..count {
            self.next_places();
        }
    }

    /// The next `count` sequences.
    pub fn take(&mut self, count: usize) -> Vec<Sequence> {
        (0..count).map(|_| Sequence::new(self.documents, &self.next_places())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(lens: &[usize]) -> Vec<Document> {
        let document = |(line, len): (usize, &usize)| Document::new(vec![7; *len], vec![true; *len], line + 1);
        lens.iter().enumerate().map(document).collect()
    }

    #[test]
    fn every_document_is_in_every_epoch_once() {
        let lens: Vec<usize> = (0..200).map(|i| i * 37 % 60 + 4).collect();
        let documents = documents(&lens);
        let mut stream = Stream::new(&documents, 64, 5, true);
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let sequences = stream.take(stream.epoch_of(epoch).len());
            assert!(sequences.iter().all(|s| s.tokens().len() <= 64));
            let mut lines: Vec<usize> = sequences.iter().flat_map(|s| s.lines().to_vec()).collect();
            orders.push(lines.clone());
            lines.sort_unstable();
            assert_eq!(lines, (1..=200).collect::<Vec<_>>());
            let used: usize = sequences.iter().map(|s| s.tokens().len()).sum();
            assert!(used * 10 > sequences.len() * 64 * 9, "{used} of {} tokens", sequences.len() * 64);
        }
        assert_ne!(orders[0], orders[1]);
    }

    #[test]
    fn a_stream_goes_on_where_it_was() {
        let documents = documents(&[10, 20, 30, 40, 50]);
        let all = Stream::new(&documents, 50, 1, true).take(20);
        for skipped in 0..20 {
            let mut stream = Stream::new(&documents, 50, 1, true);
            stream.skip(skipped);
            assert_eq!(stream.take(20 - skipped), all[skipped..]);
        }
    }

    #[test]
    fn targets_stay_within_their_document() {
        let documents = [
            Document::new(vec![1, 2, 3], vec![true; 3], 1),
            Document::new(vec![4], vec![true], 2),
            Document::new(vec![5, 6, 7], vec![false, false, true], 3),
        ];
        let sequence = Sequence::new(&documents, &[0, 1, 2]);
        assert_eq!(sequence.documents().collect::<Vec<_>>(), [0..3, 3..4, 4..7]);
        assert_eq!(sequence.targets(), (vec![0, 1, 5], vec![2, 3, 7]));
    }
}
