// Package load asks a metadata endpoint for credentials as many pods would, and measures how long the answers take.
//
// The load is open: operations begin by the clock, at a fixed rate, whether or not earlier ones were answered, and each one's
// latency counts from the moment at which it was to begin. An endpoint that stalls for a second so shows in the figures of
// every operation that was due in this second, and not, as with a loop that waits for its answers, in one of them (coordinated
// omission).
//
// One goroutine does everything, with non-blocking sockets and a timer of the kernel: Go's own network poller sleeps by the
// millisecond, and a goroutine per connection would wait for a processor as long as the answers take that are measured here.
// It therefore runs on Linux only.
package load
