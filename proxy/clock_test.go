package proxy

import (
	"testing"
	"time"
)

// The node's clock is set back by hours: nobody owes anything by the new one, and no connection is refused for it.
func TestClockSetBack(t *testing.T) {
	src := &source{}
	now := time.Now()
	src.charge(now, costAnswer)
	back := now.Add(-2 * time.Hour)
	if wait := src.charge(back, costConn); wait > 0 {
		t.Errorf("the source waits for %v", wait)
	}
	// What is owed is not forgotten when another goroutine's moment was a little earlier.
	for range 10_000 {
		src.charge(back, costRefusal)
	}
	if wait := src.charge(back.Add(-time.Millisecond), costConn); wait < maxWait {
		t.Errorf("a source that owes all it can waits for %v", wait)
	}
}
