//! Named adapters that have joined one base.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::adapter::joined::Joined;
use crate::adapter::lora::LoRAAdapter;
use crate::error::Error;
use crate::layer::forward::Term;
use crate::weight::base::Base;

/// The id of an adapter of a [`MultiAdapterLayer`](crate::MultiAdapterLayer), for forwards that choose one for each vector.
///
/// It stays valid while other adapters are added and removed, and when the adapter is renamed; once the adapter is removed,
/// no other one gets its id. It belongs to the layer that returned it and to the clones of that layer. Layers whose adapters
/// were added and removed in the same order have the same ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AdapterId {
    slot: usize,
    /// The number of adapters that the slot had before.
    generation: u64,
}

#[derive(Debug, Clone, Default)]
pub(super) struct AdapterSet {
    slots: Vec<Slot>,
    /// The slots that have an adapter, sorted by its name.
    by_name: Vec<usize>,
}

#[derive(Debug, Clone, Default)]
struct Slot {
    generation: u64,
    named: Option<Named>,
}

#[derive(Debug, Clone)]
pub(super) struct Named {
    pub(super) name: Box<str>,
    pub(super) adapter: Joined,
    pub(super) weight: f32,
    pub(super) active: bool,
}

impl Named {
    fn term(&self) -> Term<'_> {
        Term { adapter: &self.adapter, weight: self.weight }
    }
}

impl AdapterSet {
    pub(super) fn add(&mut self, name: &str, adapter: LoRAAdapter, base: &Base<'_>) -> Result<AdapterId, Error> {
        let Err(place) = self.search(name) else { return Err(Error::DuplicateAdapter { name: name.into() }) };
        let adapter = Joined::new(adapter, base).map_err(|error| in_adapter(name, error))?;
        let slot = self.slots.iter().position(|slot| slot.named.is_none()).unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(Slot::default());
        }
        self.slots[slot].named = Some(Named { name: name.into(), adapter, weight: 1.0, active: false });
        self.by_name.insert(place, slot);
        Ok(AdapterId { slot, generation: self.slots[slot].generation })
    }

    pub(super) fn remove(&mut self, name: &str) -> Result<LoRAAdapter, Error> {
        let place = self.search(name).map_err(|_| unknown(name))?;
        let slot = &mut self.slots[self.by_name.remove(place)];
        slot.generation += 1;
        slot.named.take().map(|named| named.adapter.into_adapter()).ok_or_else(|| unknown(name))
    }

    pub(super) fn rename(&mut self, name: &str, new_name: &str) -> Result<(), Error> {
        let place = self.search(name).map_err(|_| unknown(name))?;
        if name != new_name && self.search(new_name).is_ok() {
            return Err(Error::DuplicateAdapter { name: new_name.into() });
        }
        let slot = self.by_name.remove(place);
        let (Ok(place) | Err(place)) = self.search(new_name);
        self.by_name.insert(place, slot);
        if let Some(named) = &mut self.slots[slot].named {
            named.name = new_name.into();
        }
        Ok(())
    }

    pub(super) fn set_active(&mut self, names: &[&str]) -> Result<(), Error> {
        if let Some(name) = names.iter().find(|name| self.search(name).is_err()) {
            return Err(unknown(name));
        }
        let adapters = self.slots.iter_mut().filter_map(|slot| slot.named.as_mut());
        adapters.for_each(|named| named.active = names.contains(&&*named.name));
        Ok(())
    }

    pub(super) fn set_weight(&mut self, name: &str, weight: f32) -> Result<(), Error> {
        let named = self.search(name).ok().and_then(|place| self.slots[self.by_name[place]].named.as_mut());
        let named = named.ok_or_else(|| unknown(name))?;
        for (what, value) in [("weight", weight), ("weight times scale", weight * named.adapter.adapter().scale())] {
            if !value.is_finite() {
                return Err(in_adapter(name, Error::NotFinite { what, index: 0, value }));
            }
        }
        named.weight = weight;
        Ok(())
    }

    /// All adapters, sorted by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Named> + Clone {
        self.by_name.iter().filter_map(|slot| self.slots[*slot].named.as_ref())
    }

    pub(super) fn find(&self, name: &str) -> Option<&Named> {
        self.slots[self.by_name[self.search(name).ok()?]].named.as_ref()
    }

    pub(super) fn id(&self, name: &str) -> Option<AdapterId> {
        let slot = self.by_name[self.search(name).ok()?];
        Some(AdapterId { slot, generation: self.slots[slot].generation })
    }

    pub(super) fn get(&self, id: AdapterId) -> Result<&Named, Error> {
        let slot = self.slots.get(id.slot).filter(|slot| slot.generation == id.generation);
        slot.and_then(|slot| slot.named.as_ref()).ok_or(Error::RemovedAdapter)
    }

    /// The active adapters, for a forward.
    pub(super) fn active_terms(&self) -> impl Iterator<Item = Term<'_>> + Clone {
        self.iter().filter(|named| named.active).map(Named::term)
    }

    /// One adapter, for a forward; none if it was removed.
    pub(super) fn term(&self, id: AdapterId) -> Option<Term<'_>> {
        self.get(id).ok().map(Named::term)
    }

    /// The place of an adapter among the names, or where it would be.
    fn search(&self, name: &str) -> Result<usize, usize> {
        self.by_name
            .binary_search_by(|slot| self.slots[*slot].named.as_ref().map(|named| &*named.name).cmp(&Some(name)))
    }
}

fn unknown(name: &str) -> Error {
    Error::UnknownAdapter { name: name.into() }
}

fn in_adapter(name: &str, error: Error) -> Error {
    if let Error::OutOfMemory { .. } = error {
        // There may be no memory for the name either.
        return error;
    }
    Error::Adapter { name: name.into(), error: Box::new(error) }
}
