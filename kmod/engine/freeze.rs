// SPDX-License-Identifier: GPL-2.0

//! What the host may be told of its freeze.
//!
//! Knows nothing of requests and of who has frozen what; only what was answered, and what is known of
//! it since.

use super::uapi::status;

/// The freeze between a FREEZE and its THAW, as the host has to see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Freeze {
    /// There is none: the host asked for none, or it ended well, or the host knows that it did not.
    None,
    /// The module has not seen a FREEZE end since it was loaded. The host may count on one that was
    /// answered before, of which nobody here knows whether it lasted: every THAW is failed until then.
    Unseen,
    /// FREEZE `id` succeeded and its daemon is still there. It is `whole` until that daemon has had the
    /// module thaw something before the host has sent its THAW; which then breaks it. It never was if the daemon had
    /// the module thaw all of it before it answered, and has held nothing since.
    Held { id: u64, whole: bool },
    /// The host counts on a freeze that did not last until its THAW, or it does not know that its
    /// FREEZE has failed. Every THAW is failed from then on, until a FREEZE ends the matter: one that
    /// succeeds, or, when the host has been `told` by a THAW that failed, any.
    Broken { told: bool },
}

impl Freeze {
    /// In one word.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Freeze::None | Freeze::Unseen => "none",
            Freeze::Held { whole: true, .. } => "held",
            Freeze::Held { whole: false, .. } | Freeze::Broken { .. } => "broken",
        }
    }

    /// The id of the FREEZE in force.
    pub(super) fn held(self) -> Option<u64> {
        match self {
            Freeze::Held { id, .. } => Some(id),
            Freeze::None | Freeze::Unseen | Freeze::Broken { .. } => None,
        }
    }

    /// Whether something is thawed already, of which the daemon may say nothing.
    pub(super) fn is_torn(self) -> bool {
        matches!(self, Freeze::Held { whole: false, .. })
    }

    /// What the host is told for a THAW that the daemon answers with `code`.
    pub(super) fn thaw_status(self, code: u32) -> u32 {
        match self {
            Freeze::Unseen | Freeze::Broken { .. } if code == status::OK => status::FAIL,
            _ => code,
        }
    }

    /// A FREEZE has failed; `sent` says whether the host has heard of it.
    pub(super) fn after_failed_freeze(self, sent: bool) -> Self {
        match self {
            _ if !sent => Freeze::Broken { told: false },
            Freeze::Unseen | Freeze::Broken { told: true } => Freeze::None,
            other => other,
        }
    }

    /// A THAW has ended and the host was told `code`, if it was `sent`.
    pub(super) fn after_thaw(self, code: u32, sent: bool) -> Self {
        match self {
            Freeze::None | Freeze::Unseen => self,
            Freeze::Held { .. } if code == status::OK => Freeze::None,
            Freeze::Held { .. } => Freeze::Broken { told: sent },
            Freeze::Broken { told } => Freeze::Broken { told: told || sent },
        }
    }
}
