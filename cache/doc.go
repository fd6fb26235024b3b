// Package cache has the credentials of role sessions by [Key]: issued before they are asked for, refreshed long before they
// expire, and served from memory.
//
// It is level-triggered. One loop, [Cache.Run], looks at the keys that live pods are authorized for and at what it has for
// each of them, starts what is due and sleeps until the next thing will be. What is due follows from that state alone, never
// from an event that could be lost. The keys are read again after [Cache.Wake], before an entry is evicted and at least once a minute,
// not whenever an issue ends: TestLiveIsReadWhenItChanges, TestAskedBeforeItIsRead, TestNewEntryIsNotEvicted. These invariants hold, each with its test:
//
//  1. A [Key] holds every input of the issue call: equal keys share credentials, unequal keys never do.
//     TestKeyHoldsEveryInput, TestUnequalKeysShareNothing.
//  2. At most one issue per key is in flight. Those who wait for it wait for its result, each with its own deadline.
//     TestSingleFlight, TestWaitersHaveTheirOwnDeadlines, TestRandomSchedules.
//  3. A caller that leaves never cancels the issue, which has a context and a timeout of its own.
//     TestLeavingDoesNotCancel, TestIssueTimeout.
//  4. A failed refresh never removes or overwrites a value that is still valid. A value is served until 60 s before it
//     expires and never after. TestFailedRefreshKeepsValue, TestNeverServedInLastMinute, TestRandomSchedules.
//  5. A value is refreshed at half its life ±10 %, so that answers normally carry at least 20 min: 2 calls a key and hour with
//     sessions of 1 h. TestRefreshAtHalfLife, TestRefreshLeavesTwentyMinutes, TestCallsOfADay.
//  6. Errors are remembered with a jittered back-off of 1 s doubling to 60 s, until [Cache.Retry]. A token bucket bounds the
//     issue calls of the node. Keys that a request waits for go first, then those that expire soonest, then prefetch.
//     A namespace that has had more than a tenth of the calls goes after the others: whoever may annotate can make new keys
//     without end. TestChangingKeysStarveNobody.
//     An issuer that throttles is asked less often, by the whole node. TestPace, TestThrottledKeyStaysFirst, TestThunderingStart.
//     TestBackOff, TestRememberedError, TestRetry, TestRate, TestAskedKeyComesFirst, TestAskedKeysInOrder,
//     TestHangingIssuesStarveNobody.
//  7. Memory is bounded by the live keys: a key goes with its last pod. TestEviction, TestSharedKey, TestRef.
//  8. A value ends by the monotonic or by the wall clock, whichever is earlier. TestBothClocks, TestWallClockJump, TestClockAhead.
//  9. No secret is reachable through fmt, slog, encoding/json or a metric. TestRedaction.
//  10. What an earlier run kept is served for exactly its key, once that is live or asked for, until its session ends by any
//     clock, and is refreshed when it would have been: neither a restart nor an update calls an issuer. Neither a file nor a
//     value outlives its session or, once that was known, its last pod. No file and no disk can fail or delay an issue.
//     TestRestart, TestRestarts, TestCallsOfADay, TestRollOutOfEveryNode, TestRestoredOfNobody, TestEvictionRemovesFile,
//     TestUnusableFiles, TestUnusableDirectory, TestForeignOwner, TestFailingDirectory, TestFailingFile, TestKeptAtTheEnd,
//     TestClocksAcrossRestart, TestFileNameHoldsEveryField, TestTwoInstances, FuzzRestore.
//
// An [Issuer] that panics fails that one issue: TestPanicDoesNotWedge.
package cache
