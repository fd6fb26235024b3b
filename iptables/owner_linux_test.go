package iptables

import (
	"errors"
	"os"
	"path/filepath"
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

// On a disk without a free byte ownership still passes on: a daemon that refused to start would leave its node refused.
func TestOwnerOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	old, fresh := &owner{dir: dir}, &owner{dir: dir}
	if err := old.take(); err != nil {
		t.Fatal(err)
	}
	// No new file can be written, as on a full disk; the one that is there can.
	if err := os.MkdirAll(filepath.Join(dir, generationFile+".new", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := fresh.take(); err != nil {
		t.Fatal(err)
	}
	if err := old.check(); !errors.Is(err, errSuperseded) {
		t.Errorf("the instance before: %v", err)
	}
	if err := fresh.check(); err != nil {
		t.Errorf("the owner: %v", err)
	}
	// Noise that is longer than any number.
	if err := os.WriteFile(filepath.Join(dir, generationFile), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := fresh.take(); err != nil {
		t.Fatal(err)
	}
	if err := fresh.check(); err != nil {
		t.Errorf("after noise: %v", err)
	}
}
