package pods

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/time/rate"
)

// Where inotify itself fails, such as when the node has no instance left (any pod of uid 0 may have taken them all), it is tried again
// after resultsRetry, and the directory read again every resultsPoll meanwhile.
const (
	resultsRetry = 30 * time.Second
	resultsPoll  = 500 * time.Millisecond
)

// results follows the directory of CNI results. It tells Pods of each file; what follows from that is in claims.go.
type results struct {
	pods    *Pods
	dir     string // clean
	owner   uint32 // of the directory and its files: root, in tests whoever runs them
	boot    func() (time.Time, error)
	watcher func() (*fsnotify.Watcher, error)
	delay   time.Duration // reportDelay
	log     *slog.Logger
	since   time.Time      // when the node booted: what is older is of sandboxes that ended then
	odd     rate.Sometimes // log lines about single files
	state   string         // the last one that was logged
}

func newResults(p *Pods, dir string) *results {
	return &results{
		pods: p, dir: filepath.Clean(dir), boot: bootTime, watcher: fsnotify.NewWatcher, delay: reportDelay, log: p.log.With("directory", dir), odd: rate.Sometimes{First: 5, Interval: time.Minute},
	}
}

// say logs what became of the source, once until it changes.
func (s *results) say(level slog.Level, text string, args ...any) {
	if text != s.state {
		s.state = text
		s.log.Log(context.Background(), level, text, args...)
	}
}

// run follows the directory until ctx is done. It calls ready, once or more, when what is there was read for the first time.
func (s *results) run(ctx context.Context, ready func()) {
	for ctx.Err() == nil {
		err := s.follow(ctx, ready)
		if ctx.Err() != nil {
			return
		}
		s.say(slog.LevelError, "the CNI results are read again and again, because the node does not tell of them", "error", err, "interval", resultsPoll.String())
		s.poll(ctx, ready)
	}
}

// poll reads the directory again and again, until it is time to try inotify again.
func (s *results) poll(ctx context.Context, ready func()) {
	again := time.NewTicker(resultsPoll)
	defer again.Stop()
	for end := time.Now().Add(resultsRetry); time.Now().Before(end); {
		s.settle(time.Now())
		if _, err := s.scan(); err != nil {
			s.odd.Do(func() {
				s.log.Warn("the CNI results are not used, pods are known by the API server alone", "error", err)
			})
		}
		ready()
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
	}
}

func (s *results) follow(ctx context.Context, ready func()) error {
	w, err := s.watcher()
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	defer w.Close()
	for {
		watched, err := s.watch(w)
		if err != nil {
			return err
		}
		if watched == s.dir {
			files, err := s.scan()
			if err != nil {
				s.say(slog.LevelError, "the CNI results are not used, pods are known by the API server alone", "error", err)
			} else {
				s.say(slog.LevelInfo, stateFollowing, "files", files)
			}
		} else {
			s.forget()
			s.say(slog.LevelInfo, "no CNI results yet, pods are known by the API server alone until there are")
		}
		ready()
		if err := s.events(ctx, w, watched); err != nil {
			return err
		}
		if err := w.Remove(watched); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
			return fmt.Errorf("stop watching %s: %w", watched, err)
		}
	}
}

// watch watches the directory or, where there is none, the nearest above it that exists.
func (s *results) watch(w *fsnotify.Watcher) (string, error) {
	watched, next := s.dir, ""
	for {
		err := w.Add(watched)
		switch {
		case err == nil && next == "":
			return watched, nil
		case err == nil:
			if _, err := os.Stat(next); errors.Is(err, fs.ErrNotExist) {
				return watched, nil
			}
			if err := w.Remove(watched); err != nil { // it came in between
				return "", fmt.Errorf("stop watching %s: %w", watched, err)
			}
			watched, next = s.dir, ""
		case errors.Is(err, fs.ErrNotExist) && watched != filepath.Dir(watched):
			watched, next = filepath.Dir(watched), watched
		default:
			return "", fmt.Errorf("watch %s: %w", watched, err)
		}
	}
}

// events applies what happens until the watch must be made anew (nil) or does not work.
func (s *results) events(ctx context.Context, w *fsnotify.Watcher, watched string) error {
	settle := time.NewTicker(max(s.delay/10, time.Millisecond))
	defer settle.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now := <-settle.C:
			s.settle(now)
		case err := <-w.Errors:
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				return nil // some were lost; everything is read again
			}
			return fmt.Errorf("inotify: %w", err)
		case e := <-w.Events:
			switch {
			case e.Name == watched:
				return nil // it went, or its mode changed
			case watched == s.dir:
				if s.state == stateFollowing {
					s.file(filepath.Base(e.Name))
				}
			case e.Name == s.dir || strings.HasPrefix(s.dir, e.Name+string(filepath.Separator)):
				return nil
			}
		}
	}
}

const stateFollowing = "following the CNI results"

// scan reads the whole directory.
func (s *results) scan() (files int, err error) {
	found, err := s.list()
	if err != nil {
		s.forget()
		return 0, err
	}
	p := s.pods
	p.update(func(c *change) {
		p.claims.seq++
		for file := range p.claims.byFile {
			if _, ok := found[file]; !ok {
				p.claim(c, file, nil, true)
			}
		}
		for file, cl := range found {
			p.claim(c, file, cl, false)
		}
	})
	return len(found), nil
}

// list reads the newest files, as many as are kept.
func (s *results) list() (map[string]*claim, error) {
	dir, err := os.OpenFile(s.dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	info, err := dir.Stat()
	if err != nil {
		return nil, err
	}
	if err := s.trusted(info); err != nil {
		return nil, err
	}
	s.since = s.booted()
	most := s.pods.claims.max
	type candidate struct {
		name string
		at   time.Time
	}
	var newest []candidate
	trim := func() {
		slices.SortFunc(newest, func(a, b candidate) int { return b.at.Compare(a.at) })
		newest = newest[:min(len(newest), most)]
	}
	for {
		entries, err := dir.ReadDir(256)
		for _, e := range entries {
			info, err := e.Info()
			if err == nil && !info.ModTime().Before(s.since) {
				newest = append(newest, candidate{e.Name(), info.ModTime()})
			}
		}
		if len(newest) > 2*most {
			trim()
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	trim()
	found := make(map[string]*claim, len(newest))
	for _, c := range newest {
		if cl, _ := s.read(c.name); cl != nil {
			found[c.name] = cl
		}
	}
	return found, nil
}

// file takes one file as it is now.
func (s *results) file(name string) {
	cl, gone := s.read(name)
	s.pods.update(func(c *change) {
		s.pods.claims.seq++
		s.pods.claim(c, name, cl, gone)
	})
}

// forget drops everything that was read, and what was seen to go.
func (s *results) forget() {
	p := s.pods
	p.update(func(c *change) {
		for file := range p.claims.byFile {
			p.claim(c, file, nil, false)
		}
		p.settle(c, time.Now().Add(s.delay))
	})
}

// settle ends what was lost long ago.
func (s *results) settle(now time.Time) {
	s.pods.update(func(c *change) { s.pods.settle(c, now) })
}

// read returns what a file claims, if it may be believed; gone: there is none. What is empty or cut off is being written, or
// was when the node lost power; the next event reads it again.
func (s *results) read(name string) (cl *claim, gone bool) {
	cl, err := s.open(name)
	switch {
	case err == nil:
		return cl, false
	case errors.Is(err, fs.ErrNotExist):
		return nil, true
	case !errors.Is(err, errNotOurs):
		s.odd.Do(func() { s.log.Warn("a CNI result is not used", "file", name, "error", err) })
	}
	return nil, false
}

func (s *results) open(name string) (*claim, error) {
	// Not through a symbolic link; and to open a FIFO must not block.
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("it is no regular file but %s", info.Mode())
	}
	if err := s.trusted(info); err != nil {
		return nil, err
	}
	at := info.ModTime()
	if info.Size() == 0 || at.Before(s.since) {
		return nil, errNotOurs
	}
	if info.Size() > maxResultSize {
		return nil, fmt.Errorf("it has %d bytes, more than %d", info.Size(), maxResultSize)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxResultSize))
	if err != nil {
		return nil, err
	}
	r, err := parseResult(name, data)
	if err != nil {
		return nil, err
	}
	cl := &claim{result: *r, at: at}
	if !at.After(time.Now()) {
		cl.since = at
	}
	return cl, nil
}

// trusted says why something may have been written by others than root; nil: it was not.
func (s *results) trusted(info fs.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != s.owner {
		return errors.New("it does not belong to root")
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("others than root may write to it (%s)", info.Mode())
	}
	return nil
}

// booted is when the node booted; now, if that cannot be told: then only what comes from now on is believed.
func (s *results) booted() time.Time {
	boot, err := s.boot()
	if err != nil {
		s.odd.Do(func() {
			s.log.Warn("it is not known when the node booted, so no CNI result can be believed", "error", err)
		})
		return time.Now()
	}
	return boot
}

// bootTime is when the kernel booted, to the second, by the present wall clock.
func bootTime() (time.Time, error) {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return time.Time{}, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20) // the line of interrupts is long
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "btime "); ok {
			seconds, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				return time.Time{}, fmt.Errorf("/proc/stat: %w", err)
			}
			return time.Unix(seconds, 0), nil
		}
	}
	return time.Time{}, errors.Join(errors.New("/proc/stat has no btime"), lines.Err())
}
