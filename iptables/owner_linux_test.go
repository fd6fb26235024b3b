package iptables

import (
	"sync"
	"testing"
)

// An instance that takes over must not take itself for another one, however often it looks meanwhile.
func TestOwnerTakesWhileChecking(t *testing.T) {
	o := &owner{dir: t.TempDir()}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := o.check(); err != nil {
					t.Errorf("check while taking over: %v", err)
					return
				}
			}
		})
	}
	for range 500 {
		if err := o.take(); err != nil {
			t.Error(err)
			break
		}
	}
	close(done)
	wg.Wait()
}
