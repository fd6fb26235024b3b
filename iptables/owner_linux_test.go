package iptables

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// Whatever stands in a file's place, to look at it ends at once and tells of nobody: the guard, which comes after the first look,
// must not wait for a named pipe, nor the repairs end with it.
func TestOwnerWithoutFile(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"named pipe":                func(path string) error { return unix.Mkfifo(path, 0o600) },
		"directory":                 func(path string) error { return os.Mkdir(path, 0o700) },
		"symbolic link to a device": func(path string) error { return os.Symlink("/dev/zero", path) },
		"link to nothing":           func(path string) error { return os.Symlink("nothing", path) },
		"huge":                      func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<40)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := errors.Join(put(filepath.Join(dir, generationFile)), put(filepath.Join(dir, generationFile+".new"))); err != nil {
				t.Fatal(err)
			}
			o := &owner{dir: dir}
			done := make(chan error, 1)
			go func() {
				n, err := o.read()
				if n != 0 {
					err = errors.Join(err, fmt.Errorf("generation %d", n))
				}
				done <- errors.Join(err, o.check())
			}()
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("it waits")
			}
			if name == "directory" { // nothing can take its place
				return
			}
			go func() { done <- errors.Join(o.take(), o.check()) }()
			select {
			case err := <-done:
				if n, _ := o.read(); err != nil || n != o.generation.Load() {
					t.Errorf("generation %d after taking over: %v", n, err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("to take over waits")
			}
		})
	}
}
