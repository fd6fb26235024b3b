package cache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// kept runs a cache that keeps what it has in dir.
func kept(t *testing.T, dir string, live map[Key]bool) *rig {
	t.Helper()
	return start(t, func(o *Options) { o.Dir, o.Rate = dir, 1000 }, live)
}

func keys(n int) map[Key]bool {
	live := map[Key]bool{}
	for i := range n {
		live[testKey(i)] = true
	}
	return live
}

// files are the names in dir.
func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "state", "credentials")
		live := keys(20)
		live[testKey(20)] = false // has asked once
		r := kept(t, dir, live)
		r.mustGet(testKey(20), time.Second)
		synctest.Wait()
		r.stop()

		time.Sleep(10 * time.Minute)
		again := kept(t, dir, nil)
		again.sts.set(after(0, errDown))
		time.Sleep(5 * time.Minute) // until the pods are known
		for key := range live {
			if again.Peek(&key, nil, time.Now()) != nil {
				t.Fatal("served before its key was live")
			}
		}
		again.live.set(live)
		again.Wake()
		synctest.Wait()
		for key := range live {
			c, want := again.Peek(&key, nil, time.Now()), r.Peek(&key, nil, time.Now())
			if c == nil {
				t.Fatalf("nothing for %+v", key)
			}
			if c.AccessKeyID != want.AccessKeyID || c.SecretAccessKey() != want.SecretAccessKey() || c.SessionToken() != want.SessionToken() ||
				!c.Expires.Equal(want.Expires) || !c.Issued.Equal(want.Issued) || c.RequestID != want.RequestID ||
				string(c.Document()) != "document of "+c.AccessKeyID || r.sts.owner(c) != key {
				t.Errorf("restored %v of %s, want %v", c, c.RequestID, want)
			}
		}
		if n := len(again.sts.issued()); n != 0 {
			t.Errorf("%d issues, want none", n)
		}
		// A value of an earlier run ends like any other.
		time.Sleep(44*time.Minute - time.Second)
		if key := testKey(1); again.Peek(&key, nil, time.Now()) == nil {
			t.Error("not served until the last minute")
		}
		time.Sleep(time.Second)
		for key := range live {
			if again.Peek(&key, nil, time.Now()) != nil {
				t.Error("served in the last minute")
			}
		}
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if names := files(t, dir); len(names) != 0 {
			t.Errorf("files of ended sessions: %v", names)
		}
	})
}

// However often it is started anew, the daemon asks STS no more often and serves credentials no older than if it had not been.
func TestRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		live := map[Key]bool{}
		for i := range 5 {
			key := testKey(i)
			key.Duration = 45 * time.Minute
			live[key] = i != 0
		}
		lazy := testKey(0)
		lazy.Duration = 45 * time.Minute
		const runs, each = 40, 7 * time.Minute
		calls := 0
		for run := range runs {
			r := kept(t, dir, live)
			if run == 0 {
				r.mustGet(lazy, time.Second)
			}
			synctest.Wait()
			for range each / time.Minute {
				for key := range live {
					if c := r.Peek(&key, nil, time.Now()); c == nil {
						t.Fatalf("run %d: nothing for %s", run, key.RoleARN)
					} else if left := time.Until(c.Expires); left < 20*time.Minute {
						t.Fatalf("run %d: %s left", run, left)
					}
				}
				time.Sleep(time.Minute)
				synctest.Wait()
			}
			calls += len(r.sts.issued())
			r.stop()
		}
		perLife := float64(calls) / float64(len(live)) / (float64(runs*each) / float64(45*time.Minute))
		if perLife > 2/(1-jitter)+0.2 {
			t.Errorf("%.2f issues a key and life, want 2", perLife)
		}
	})
}

// What is not live is never served, and its file goes when it ends, also while nobody looks.
func TestRestoredOfNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "c")
		r := kept(t, dir, keys(3))
		synctest.Wait()
		r.stop()
		again := kept(t, dir, map[Key]bool{testKey(1): true})
		if err := os.Remove(filepath.Join(dir, fileName(testKey(2)))); err != nil { // as the other instance of an update would
			t.Fatal(err)
		}
		for at := time.Duration(0); at < 70*time.Minute; at += time.Minute {
			synctest.Wait()
			if key := testKey(0); again.Peek(&key, nil, time.Now()) != nil || len(again.entries()) != 1 {
				t.Fatal("a key without a pod is served")
			}
			want := 2
			if at >= time.Hour {
				want = 1
			}
			again.mu.RLock()
			waiting := len(again.restored)
			again.mu.RUnlock()
			if n := len(files(t, dir)); at < 58*time.Minute || at >= time.Hour {
				if n != want || waiting != 2*(want-1) {
					t.Fatalf("after %s: %d files and %d values, want %d and %d", at, n, waiting, want, 2*(want-1))
				}
			}
			time.Sleep(time.Minute)
		}
		again.stop()
		if names := slices.Collect(maps.Keys(again.store.written)); !slices.Equal(names, []string{fileName(testKey(1))}) {
			t.Errorf("the store knows files %v, want that of the key with a pod", names)
		}
	})
}

func TestEvictionRemovesFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "c")
		r := kept(t, dir, keys(3))
		synctest.Wait()
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("directory: %v %v, want mode 0700", info.Mode(), err)
		}
		for _, name := range files(t, dir) {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o600 {
				t.Errorf("file: %v %v, want mode 0600", info.Mode(), err)
			}
		}
		// One restored and evicted, one issued and evicted.
		r.stop()
		again := kept(t, dir, keys(4))
		synctest.Wait()
		if n := len(files(t, dir)); n != 4 {
			t.Errorf("%d files, want 4", n)
		}
		again.live.set(map[Key]bool{testKey(1): true, testKey(2): true})
		again.Wake()
		synctest.Wait()
		want := []string{fileName(testKey(1)), fileName(testKey(2))}
		slices.Sort(want)
		if names := files(t, dir); !slices.Equal(names, want) {
			t.Errorf("files %v, want %v", names, want)
		}
		if names := slices.Sorted(maps.Keys(again.store.written)); !slices.Equal(names, want) {
			t.Errorf("the store knows files %v, want %v", names, want)
		}
	})
}

// content is what a file has that was written now.
func content(t testing.TB, key Key, change func(*stored)) []byte {
	t.Helper()
	up, err := uptime()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	d := stored{
		Version: storeVersion, Key: key, AccessKeyID: "ASIAKEPT", SecretAccessKey: "sekrit-key", SessionToken: "sekrit-token", RequestID: "id",
		Issued: now, IssuedUptime: int64(up.Seconds()), Expires: now.Add(key.Duration),
	}
	if change != nil {
		change(&d)
	}
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A file that cannot be used costs one STS call and a log line that quotes nothing of it. The others are used.
func TestUnusableFiles(t *testing.T) {
	key := testKey(1)
	good := content(t, key, nil)
	path := func(dir string) string { return filepath.Join(dir, fileName(key)) }
	write := func(b []byte, mode fs.FileMode) func(dir string) error {
		return func(dir string) error {
			return errors.Join(os.WriteFile(path(dir), b, 0o600), os.Chmod(path(dir), mode))
		}
	}
	changed := func(change func(*stored)) func(string) error { return write(content(t, key, change), 0o600) }
	for name, tt := range map[string]struct {
		put func(dir string) error
		log string // empty: silent
	}{
		"empty":     {write(nil, 0o600), "not what this version writes"},
		"truncated": {write(good[:len(good)-20], 0o600), "not what this version writes"},
		"corrupt":   {write(bytes.Replace(good, []byte(`"version":1`), []byte(`"version":"sekrit"`), 1), 0o600), "not what this version writes"},
		"two":       {write(append(slices.Clone(good), good...), 0o600), "not what this version writes"},
		"huge":      {write(append(slices.Clone(good), bytes.Repeat([]byte(" "), maxFileLen)...), 0o600), "64 KiB"},
		"readable":  {write(good, 0o640), "mode 0640"},
		"writable":  {write(good, 0o602), "mode 0602"},
		"symlink": {func(dir string) error {
			return errors.Join(os.WriteFile(dir+".elsewhere", good, 0o600), os.Symlink(dir+".elsewhere", path(dir)))
		}, "symbolic links"},
		"named pipe":      {func(dir string) error { return syscall.Mkfifo(path(dir), 0o600) }, "regular file"},
		"directory":       {func(dir string) error { return os.Mkdir(path(dir), 0o700) }, "regular file"},
		"another key":     {changed(func(d *stored) { d.Key.ExternalID = "x" }), "another key"},
		"later version":   {changed(func(d *stored) { d.Version++ }), "version 2"},
		"no secret":       {changed(func(d *stored) { d.SecretAccessKey = "" }), "incomplete"},
		"no token":        {changed(func(d *stored) { d.SessionToken = "" }), "incomplete"},
		"no id":           {changed(func(d *stored) { d.AccessKeyID = "" }), "incomplete"},
		"endless":         {changed(func(d *stored) { d.Expires = d.Expires.AddDate(7000, 0, 0) }), "longer than a session"},
		"future":          {changed(func(d *stored) { d.Issued = d.Issued.Add(maxSkew + time.Minute) }), "set back"},
		"before the boot": {changed(func(d *stored) { d.IssuedUptime += 60 }), "last boot"},
		"overflow":        {changed(func(d *stored) { d.IssuedUptime = 1 << 62 }), "last boot"},
		"negative":        {changed(func(d *stored) { d.IssuedUptime = -1 << 62 }), "last boot"},
		"expired":         {changed(func(d *stored) { d.Issued, d.Expires = d.Issued.Add(-time.Hour), d.Expires.Add(-time.Hour) }), ""},
		"last minute": {changed(func(d *stored) {
			d.Issued, d.Expires = d.Issued.Add(-time.Hour+margin), d.Expires.Add(-time.Hour+margin)
		}), ""},
		"expired before it began": {changed(func(d *stored) { d.Issued, d.Expires = d.Issued.Add(maxSkew), d.Issued.Add(-time.Hour) }), ""},
		"ages ago":                {changed(func(d *stored) { d.Issued, d.Expires = time.Time{}, time.Time{}.Add(time.Hour) }), ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "c")
			other := testKey(2)
			if err := errors.Join(os.Mkdir(dir, 0o700), tt.put(dir),
				os.WriteFile(filepath.Join(dir, fileName(other)), content(t, other, nil), 0o600)); err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			c := New(Options{Issuer: newFakeSTS(t), Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err := c.Restore(); err != nil {
				t.Fatal(err)
			}
			if _, ok := c.restored[other]; !ok || len(c.restored) != 1 {
				t.Errorf("restored %v, want the other key alone", slices.Collect(maps.Keys(c.restored)))
			}
			if _, err := os.Lstat(path(dir)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the file is still there: %v", err)
			}
			dropped := strings.Contains(log.String(), "kept credentials dropped")
			if dropped != (tt.log != "") || !strings.Contains(log.String(), tt.log) || strings.Contains(log.String(), "sekrit") {
				t.Errorf("log, which should say %q:\n%s", tt.log, &log)
			}
		})
	}
	t.Run("left by a killed writer", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "c")
		old, young := filepath.Join(dir, "1.tmp"), filepath.Join(dir, "2.tmp")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(old, good, 0o600), os.WriteFile(young, good, 0o600),
			os.Chtimes(old, time.Time{}, time.Now().Add(-2*time.Minute))); err != nil {
			t.Fatal(err)
		}
		c := New(Options{Dir: dir})
		if err := c.Restore(); err != nil || len(c.restored) != 0 {
			t.Errorf("restored %d: %v", len(c.restored), err)
		}
		if names := files(t, dir); !slices.Equal(names, []string{"2.tmp"}) {
			t.Errorf("files %v, want only what another instance may be writing", names)
		}
	})
}

// ownedBy is a 0600 file of a user: only root could make one for the test.
type ownedBy struct {
	fs.FileInfo
	uid uint32
}

func (o ownedBy) Mode() fs.FileMode { return 0o600 }
func (o ownedBy) Sys() any          { return &syscall.Stat_t{Uid: o.uid} }

func TestForeignOwner(t *testing.T) {
	for uid, ok := range map[uint32]bool{0: true, uint32(os.Geteuid()): true, 4242: false} {
		if err := ownedAlone(ownedBy{uid: uid}); (err == nil) != ok {
			t.Errorf("a file of user %d: %v", uid, err)
		}
	}
}

func TestUnusableDirectory(t *testing.T) {
	for name, put := range map[string]func(dir string) error{
		"file":       func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
		"named pipe": func(dir string) error { return syscall.Mkfifo(dir, 0o600) },
		"symlink":    func(dir string) error { return errors.Join(os.Mkdir(dir+"2", 0o700), os.Symlink(dir+"2", dir)) },
		"open":       func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o750)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "c")
			if err := put(dir); err != nil {
				t.Fatal(err)
			}
			if err := New(Options{Dir: dir}).Restore(); err == nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("Restore: %v, want a refusal that names it", err)
			}
		})
	}
}

// A disk that fails delays and fails nothing, is told of once a minute, and is written to again when it works.
func TestFailingDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "c")
		var log bytes.Buffer
		r := start(t, func(o *Options) { o.Dir, o.Rate, o.Log = dir, 1000, slog.New(slog.NewTextHandler(&log, nil)) }, nil)
		synctest.Wait()
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		live := keys(50)
		began := time.Now()
		r.live.set(live)
		r.Wake()
		synctest.Wait()
		for key := range live {
			if r.Peek(&key, nil, time.Now()) == nil {
				t.Errorf("nothing for %s", key.RoleARN)
			}
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("issues took %s", took)
		}
		time.Sleep(10*time.Minute + time.Second)
		synctest.Wait()
		if n := strings.Count(log.String(), "not kept"); n < 5 || n > 11 || strings.Contains(log.String(), "secret of") {
			t.Errorf("%d lines in ten minutes:\n%s", n, &log)
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(pause + resync)
		synctest.Wait()
		if n := len(files(t, dir)); n != len(live) {
			t.Errorf("%d files, want %d", n, len(live))
		}
		// What has ended by the time the disk works is not written.
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		late := testKey(99)
		r.sts.set(func(_ context.Context, _ Key, nth int) error {
			if nth > 0 {
				return errDown
			}
			return nil
		})
		r.live.set(map[Key]bool{late: true})
		r.mustGet(late, time.Second)
		time.Sleep(late.Duration)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			time.Sleep((pause + resync) / 20)
			synctest.Wait()
			if names := files(t, dir); len(names) != 0 {
				t.Fatalf("files of ended sessions: %v", names)
			}
		}
	})
}

// What fails for one key fails for no other, and leaves nothing behind.
func TestFailingFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "c")
		r := kept(t, dir, nil)
		synctest.Wait()
		inTheWay := filepath.Join(dir, fileName(testKey(0)), "full")
		if err := os.MkdirAll(inTheWay, 0o700); err != nil {
			t.Fatal(err)
		}
		r.live.set(keys(10))
		r.Wake()
		time.Sleep(pause + resync)
		synctest.Wait()
		if n := len(files(t, dir)); n != 10 {
			t.Errorf("files %v, want 9 and the directory", files(t, dir))
		}
		if err := os.RemoveAll(filepath.Dir(inTheWay)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(pause + resync)
		synctest.Wait()
		if info, err := os.Stat(filepath.Dir(inTheWay)); err != nil || !info.Mode().IsRegular() {
			t.Errorf("not written once it could be: %v", err)
		}
		// Nor is what could not be written for a key that has gone meanwhile.
		inTheWay = filepath.Join(dir, fileName(testKey(10)), "full")
		if err := os.MkdirAll(inTheWay, 0o700); err != nil {
			t.Fatal(err)
		}
		r.live.set(keys(11))
		r.Wake()
		synctest.Wait()
		r.live.set(keys(10))
		r.Wake()
		synctest.Wait()
		if err := os.RemoveAll(filepath.Dir(inTheWay)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(pause + resync)
		synctest.Wait()
		if n := len(files(t, dir)); n != 10 {
			t.Errorf("files %v, want those of 10 keys", files(t, dir))
		}
	})
}

// A session that was issued while Run ended is kept too; one that was restored is not written anew.
func TestKeptAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "c")
		key := testKey(1)
		release := make(chan struct{})
		r := start(t, func(o *Options) {
			o.Dir = dir
			answering(func(context.Context, Key, int) error { <-release; return nil })(o)
		}, map[Key]bool{key: true})
		synctest.Wait()
		go func() {
			time.Sleep(time.Second)
			close(release)
		}()
		r.stop()
		path := filepath.Join(dir, fileName(key))
		before, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		again := kept(t, dir, map[Key]bool{key: true})
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if info, err := os.Stat(path); err != nil || !os.SameFile(before, info) || len(again.sts.issued()) != 0 {
			t.Errorf("the file was replaced without a new session: %v", err)
		}
	})
}

// Two runs may be hours apart, and the wall clock may have been set meanwhile.
func TestClocksAcrossRestart(t *testing.T) {
	const hour, min = time.Hour, time.Minute
	for _, tt := range []struct {
		name     string
		boot     time.Duration // since the issue, by the clock that nobody can set
		wall     time.Duration
		duration time.Duration
		left     time.Duration // of serving
		due      bool
	}{
		{"fresh", 0, 0, hour, 59 * min, false},
		{"after a while", min, 10 * min, hour, 49 * min, false},
		{"after half life", min, 34 * min, hour, 25 * min, true},
		{"set ahead", 2 * min, 50 * min, hour, 9 * min, true},
		{"set ahead beyond the end", 2 * min, 2 * hour, hour, 0, true},
		{"set back", 40 * min, 10 * min, hour, 19 * min, true},
		{"set back, at the end", 59 * min, 10 * min, hour, 0, true},
		{"shorter than the last minute", 0, 0, margin, 0, true},
		{"set back before the issue, a little", 40 * min, -30 * time.Second, hour, 19 * min, true},
		{"set back, duration not known", 40 * min, 10 * min, 0, 19 * min, true},
		{"duration not known", 0, 40 * min, 0, 19 * min, true},
	} {
		key := testKey(1)
		key.Duration = tt.duration
		now := time.Now()
		b := content(t, key, func(d *stored) {
			d.Issued = now.Add(-tt.wall)
			d.Expires = d.Issued.Add(hour)
			d.IssuedUptime = 100
		})
		_, v, err := decode(fileName(key), b, now, 100*time.Second+tt.boot, nil)
		if tt.left <= 0 {
			if !errors.Is(err, errEnded) {
				t.Errorf("%s: %v, want its end", tt.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if left := v.serveUntil.Sub(now); (left - tt.left).Abs() > 2*time.Second {
			t.Errorf("%s: served for %s, want %s", tt.name, left, tt.left)
		}
		if due := !(&entry{value: v}).dueAt(now).After(now); due != tt.due {
			t.Errorf("%s: to be refreshed: %v, want %v", tt.name, due, tt.due)
		}
	}
}

func TestFileNameHoldsEveryField(t *testing.T) {
	base := testKey(1)
	names := map[string]string{fileName(base): "the base"}
	all := variants(t, base)
	// Neither do neighbours run into each other, nor is a byte lost.
	all["shifted"] = Key{RoleARN: base.RoleARN + base.SessionName, Namespace: base.Namespace, ServiceAccount: base.ServiceAccount, Duration: base.Duration}
	for i, s := range []string{"\xff", "\xfe", "\uFFFD", `\xff`, "`", `"`, "\x00", "\n"} {
		key := base
		key.ExternalID = s
		all[fmt.Sprint("odd ", i)] = key
	}
	for field, key := range all {
		if other, ok := names[fileName(key)]; ok {
			t.Errorf("%s and %s have one file", field, other)
		}
		names[fileName(key)] = field
	}
}

// During an update two instances share the directory: there is always a whole file, and that of the later session stays.
func TestTwoInstances(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	open := func() *store {
		s, err := openStore(dir, func(file string, err error) { t.Errorf("%s: %v", file, err) })
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	const n = 100
	base := time.Now()
	var wg sync.WaitGroup
	for writer := range 2 {
		s := open()
		wg.Go(func() {
			for i := range n {
				want := map[Key]*value{}
				for k := range 3 {
					now := base.Add(time.Duration(2*i+writer) * time.Millisecond)
					c := NewCredentials(fmt.Sprintf("ASIA%d", 2*i+writer), strings.Repeat("s", 10*i), strings.Repeat("t", 30*i+1), now, now.Add(time.Hour))
					if i == 0 {
						c = NewCredentials("ASIA", "s", "t", now, now.Add(time.Hour))
					}
					v, err := newValue(c, time.Hour, 0, now, nil)
					if err != nil {
						t.Error(err)
						return
					}
					want[testKey(k)] = v
				}
				if err := s.sync(want, base.Add(time.Second)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	reader := open()
	wg.Go(func() {
		for range n {
			if _, err := reader.restore(base.Add(time.Second), nil); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()

	values, err := open().restore(base.Add(time.Second), nil)
	if err != nil || len(values) != 3 {
		t.Fatalf("%d values: %v", len(values), err)
	}
	if names := files(t, dir); len(names) != 3 {
		t.Errorf("files %v", names)
	}
	// A late write, as after a full disk, does not bring back an older session.
	late, err := newValue(NewCredentials("OLD", "s", "t", base.Add(-time.Minute), base.Add(time.Hour)), time.Hour, 0, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := open().sync(map[Key]*value{testKey(0): late}, base.Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if values, err = open().restore(base.Add(time.Second), nil); err != nil || values[testKey(0)].creds.AccessKeyID == "OLD" {
		t.Errorf("%v %v, want the later session", values[testKey(0)], err)
	}
}

// Whatever a file holds, it neither panics nor makes anything be served for another key, or in its last minute.
func FuzzRestore(f *testing.F) {
	key := testKey(1)
	good := content(f, key, nil)
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte(`{"version":1,"issued":"0001-01-01T00:00:00Z","expires":"9999-12-31T23:59:59Z","issued_uptime":-9223372036854775808}`))
	f.Add(bytes.Replace(good, []byte(`"issued_uptime":`), []byte(`"issued_uptime":9`), 1))
	f.Add(bytes.Replace(good, []byte(`"Duration":3600000000000`), []byte(`"Duration":-9223372036854775808`), 1))
	f.Add(content(f, key, func(d *stored) { d.Issued, d.Expires = d.Issued.Add(-9*time.Hour), d.Expires.Add(39*time.Hour) }))
	name := fileName(key)
	up, err := uptime()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		now := time.Now()
		for _, name := range []string{name, fileNameIn(b)} {
			got, v, err := decode(name, b, now, up, nil)
			if err != nil {
				if v != nil || len(err.Error()) > 80 {
					t.Errorf("%v with %v", err, v)
				}
				continue
			}
			if fileName(got) != name {
				t.Errorf("the file %s is used for %+v", name, got)
			}
			if name == fileName(key) && got != key {
				t.Errorf("used for %+v", got)
			}
			c := v.creds
			if c.AccessKeyID == "" || c.SecretAccessKey() == "" || c.SessionToken() == "" {
				t.Error("incomplete")
			}
			end := c.Expires.Add(-margin)
			if v.serveUntilWall.After(end) || v.servable(end) || v.serveUntil.Sub(now) > maxSession+maxSkew {
				t.Errorf("served until %s and %s, but expires at %s", v.serveUntil, v.serveUntilWall, c.Expires)
			}
			if got.Duration > 0 && v.serveUntil.Sub(now) > got.Duration-margin {
				t.Errorf("served for %s of %s", v.serveUntil.Sub(now), got.Duration)
			}
			if v.refreshAt.After(v.serveUntil) {
				t.Errorf("refreshed at %s, served until %s", v.refreshAt, v.serveUntil)
			}
		}
	})
}

// fileNameIn is the name that content has if it is anything: most inputs would otherwise fail on their name.
func fileNameIn(b []byte) string {
	var d stored
	_ = json.Unmarshal(b, &d)
	return fileName(d.Key)
}
