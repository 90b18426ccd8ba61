"""What sessions keep read on the device, together within a number of bytes: who spoke longest ago reads again."""

from __future__ import annotations

import threading
import weakref

from aloud.conversation import Conversation


class SessionCaches:
    """The cached prefixes of all sessions of an engine. Every method may be called from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.evicted = 0  # caches that had to go
        self._conversations: weakref.WeakKeyDictionary[Conversation, None] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes of all of them."""
        with self._lock:
            return sum(conversation.cached_bytes for conversation in self._conversations)

    def keep(self, conversation: Conversation) -> None:
        """A conversation has just been read further: drop the caches of others, oldest first, until all fit.

        One that does not fit by itself drops its own.
        """
        with self._lock:
            self._conversations.pop(conversation, None)
            if conversation.cached_bytes > self.limit_bytes:
                self._evict(conversation)
                return
            self._conversations[conversation] = None  # last
            used = sum(other.cached_bytes for other in self._conversations)
            for other in list(self._conversations):
                if used <= self.limit_bytes:
                    break
                used -= other.cached_bytes
                del self._conversations[other]
                self._evict(other)

    def _evict(self, conversation: Conversation) -> None:
        if conversation.cached_bytes:  # it may have lost it by itself
            conversation.forget_read()
            self.evicted += 1
