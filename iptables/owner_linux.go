package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// owner decides which of two instances on a node repairs the rules: the one whose generation stands in the state directory.
// Whoever changes rules holds the lock, so the old instance cannot undo what the new one is doing.
type owner struct {
	dir        string        // empty: nobody else is here
	generation atomic.Uint64 // of the last instance that this one knows of; its own after take
}

const (
	lockFile       = "rules.lock"
	generationFile = "rules.generation"
)

// errSuperseded: another instance has taken the rules over.
var errSuperseded = errors.New("another instance has taken over the rules")

// locked runs change while no other instance touches the rules.
func (o *owner) locked(ctx context.Context, change func() error) error {
	if o.dir == "" {
		return change()
	}
	f, err := os.OpenFile(filepath.Join(o.dir, lockFile), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("lock the rules: %w: -state-dir must be a writable directory of the node, or empty", err)
	}
	defer f.Close()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return change()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock the rules: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lock the rules: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond): // flock cannot be waited for with a context
		}
	}
}

// maxGeneration is more than a number needs, in bytes.
const maxGeneration = 32

// read returns the generation of the present owner; 0 if the file is lost, is none or holds no number: that tells of nobody.
func (o *owner) read() (uint64, error) {
	fail := func(err error) (uint64, error) { return 0, fmt.Errorf("read the owner of the rules: %w", err) }
	f, err := os.OpenFile(filepath.Join(o.dir, generationFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // a named pipe would block
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return 0, nil
	}
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return fail(err)
	} else if !info.Mode().IsRegular() {
		return 0, nil
	}
	b, err := io.ReadAll(io.LimitReader(f, maxGeneration))
	if err != nil {
		return fail(err)
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 63) // there is a next one
	if err != nil {
		return 0, nil
	}
	return n, nil
}

// take makes this instance the owner. The caller holds the lock.
func (o *owner) take() error {
	if o.dir == "" {
		return nil
	}
	n, _ := o.read() // what cannot be read can be replaced, or writing says why not
	// No less than the time, or an instance whose file was lost would not be told of this one.
	n = max(n, o.generation.Load(), uint64(time.Now().UnixNano())) + 1
	path, content := filepath.Join(o.dir, generationFile), strconv.AppendUint(nil, n, 10)
	// Known before it can be read: check, which holds no lock, would take it for another instance's.
	before := o.generation.Swap(n)
	_ = os.Remove(path + ".new") // of an instance that was killed, or a named pipe, which would block
	err := os.WriteFile(path+".new", content, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil && overwrite(path, content) != nil {
		o.generation.Store(before)
		return fmt.Errorf("take over the rules: %w", err)
	}
	return nil
}

// overwrite writes into a file that is there: on a disk without a free byte that needs none. The instance before this one is told
// by no event, and finds out before its next repair.
func overwrite(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(content, 0); err == nil {
		err = f.Truncate(int64(len(content)))
	}
	return errors.Join(err, f.Close())
}

// check returns errSuperseded once an instance that was unknown so far has taken over. A file that is lost or holds no number changes
// nothing: else whoever spoils it would end all repairs.
func (o *owner) check() error {
	if o.dir == "" {
		return nil
	}
	n, err := o.read()
	if err != nil {
		return err
	}
	if n > o.generation.Load() {
		return errSuperseded
	}
	return nil
}
