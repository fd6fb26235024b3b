package cache

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	storeVersion = 1              // an instance removes the files of others: that costs STS calls, once
	storeSuffix  = ".json"        // of every file but those that are being written
	maxFiles     = 4096           // looked at in one go: many times the pods of a node
	maxFileLen   = 64 << 10       // bytes of one; session tokens are a few kilobytes
	maxSession   = 48 * time.Hour // STS issues 12 h at most; the rest is for clocks that disagree
	maxSkew      = margin         // how far in the future a file may have been written
	// sweepEvery is how often files that have ended are looked for. Run lets pass up to resync more: less than the margin, so no
	// file outlives its session.
	sweepEvery = resync
	pause      = time.Minute // after a failure of the disk
)

// store keeps credentials in a directory, one plain 0600 file a key, for the next run of the daemon. Sealing them with a key
// that lies beside them would protect nothing; the directory is root's and on a tmpfs. This is the only place where a secret
// is written. Two instances may share the directory: files are replaced in one step, and the last that was issued stays.
// It is not safe for concurrent use: restore comes before the one goroutine that calls sync.
type store struct {
	dir     string
	pending map[Key]*value    // is to be written
	written map[string]*value // by file name: what is there of ours, or was restored
	resume  time.Time         // no writing before, as it failed
	sweepAt time.Time
	problem func(file string, err error) // is told of files that are removed because they cannot be used
}

// stored is the content of a file. It has the whole key: what a file is worth is decided by its content, not by its name.
type stored struct {
	Version         int       `json:"version"`
	Key             Key       `json:"key"`
	AccessKeyID     string    `json:"access_key_id"`
	SecretAccessKey string    `json:"secret_access_key"`
	SessionToken    string    `json:"session_token"`
	RequestID       string    `json:"request_id"`
	Issued          time.Time `json:"issued"`
	IssuedUptime    int64     `json:"issued_uptime"` // seconds since the node booted: the wall clock may be set between two runs
	Expires         time.Time `json:"expires"`
}

// openStore makes the directory when it is missing and refuses one that somebody else could use.
func openStore(dir string, problem func(file string, err error)) (*store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s must be a directory, not a %s: remove it", dir, info.Mode().Type())
	}
	if err := ownedAlone(info); err != nil {
		return nil, fmt.Errorf("%s %w", dir, err)
	}
	return &store{dir: dir, pending: make(map[Key]*value), written: make(map[string]*value), problem: problem}, nil
}

// ownedAlone refuses what another user owns or may read or write.
func ownedAlone(info fs.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return errors.New("belongs to another user: it must belong to root")
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("has mode %04o: only its owner may have access (chmod go=)", info.Mode().Perm())
	}
	return nil
}

// fileName is a hash: parts of a key are long, and hold what file names cannot. %#v names and quotes every field there is.
func fileName(key Key) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%#v", key))
	return fmt.Sprintf("%x%s", sum[:16], storeSuffix)
}

// restore returns what is left of an earlier run.
func (s *store) restore(now time.Time, encode func(Credentials) []byte) (map[Key]*value, error) {
	values := make(map[Key]*value)
	err := s.read(now, encode, func(name string, key Key, v *value) { values[key], s.written[name] = v, v })
	return values, err
}

// sync makes the directory follow changes, the new values of keys or nil for those that have gone, and removes what has ended. It
// tries everything and returns one error, the disk's; then it tries again a minute later.
func (s *store) sync(changes map[Key]*value, now time.Time) error {
	for key, v := range changes {
		if v != nil {
			s.pending[key] = v
			continue
		}
		// Another instance may have replaced it meanwhile. It goes all the same: that costs one STS call at its restart.
		name := fileName(key)
		_ = os.Remove(filepath.Join(s.dir, name))
		delete(s.pending, key)
		delete(s.written, name)
	}
	var failed error
	if !now.Before(s.sweepAt) { // also what nobody here wrote
		s.sweepAt = now.Add(sweepEvery)
		maps.DeleteFunc(s.written, func(_ string, v *value) bool { return !v.servable(now) })
		failed = s.read(now, nil, func(string, Key, *value) {})
	}
	if now.Before(s.resume) {
		return nil
	}
	for key, v := range s.pending {
		if v.servable(now) {
			name := fileName(key)
			if err := s.save(name, key, v.creds, now); err != nil {
				failed = err
				continue
			}
			s.written[name] = v
		}
		delete(s.pending, key)
	}
	if failed != nil {
		s.resume = now.Add(pause)
	}
	return failed
}

// save replaces a key's file in one step: a reader, also one in another process, sees the old or the new content. A session that
// another instance got later stays.
func (s *store) save(name string, key Key, c Credentials, now time.Time) (err error) {
	up, err := uptime()
	if err != nil {
		return err
	}
	path := filepath.Join(s.dir, name)
	if b, err := readFile(path); err == nil {
		if _, v, err := decode(name, b, now, up, nil); err == nil && v.creds.Issued.After(c.Issued) {
			return nil
		}
	}
	b, err := json.Marshal(stored{
		Version: storeVersion, Key: key, AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey(),
		SessionToken: c.SessionToken(), RequestID: c.RequestID, Issued: c.Issued.UTC(),
		IssuedUptime: max(0, int64((up - now.Sub(c.Issued)).Seconds())), Expires: c.Expires.UTC(),
	})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.dir, "*.tmp") // 0600, and never an existing file
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// read yields what is in the directory, can be used and is not known yet. It removes what cannot be used.
func (s *store) read(now time.Time, encode func(Credentials) []byte, yield func(name string, key Key, v *value)) error {
	up, err := uptime()
	if err != nil {
		return err
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(maxFiles)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		if !strings.HasSuffix(e.Name(), storeSuffix) {
			// Of a writer that was killed, or nobody's. What another instance is writing is younger.
			if info, err := e.Info(); err == nil && now.Sub(info.ModTime()).Abs() > time.Minute {
				_ = os.Remove(path)
			}
			continue
		}
		if s.written[e.Name()] != nil {
			continue
		}
		b, err := readFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // another instance has just removed it
		}
		var (
			key Key
			v   *value
		)
		if err == nil {
			key, v, err = decode(e.Name(), b, now, up, encode)
		}
		if err == nil {
			yield(e.Name(), key, v)
			continue
		}
		if !errors.Is(err, errEnded) {
			s.problem(e.Name(), err)
		}
		_ = os.Remove(path)
	}
	return nil
}

// readFile reads a file that only its owner could have written.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) // a named pipe would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFileLen {
		return nil, errors.New("not a regular file of at most 64 KiB")
	}
	if err := ownedAlone(info); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, maxFileLen))
}

// errEnded is of a session that cannot be served any more: the normal end of a file.
var errEnded = errors.New("expired")

// decode returns what the content of a file is worth, now and that long after the boot. No error quotes the content.
func decode(name string, b []byte, now time.Time, up time.Duration, encode func(Credentials) []byte) (Key, *value, error) {
	var d stored
	if err := json.Unmarshal(b, &d); err != nil {
		return Key{}, nil, errors.New("not what this version writes") // json's text could quote a secret
	}
	life := d.Expires.Sub(d.Issued)
	sinceBoot := time.Duration(min(max(d.IssuedUptime, -1), int64(up/time.Second)+1)) * time.Second
	switch {
	case d.Version != storeVersion:
		return Key{}, nil, fmt.Errorf("of version %d, not %d", d.Version, storeVersion)
	case fileName(d.Key) != name:
		return Key{}, nil, errors.New("of another key than its name says")
	case d.AccessKeyID == "" || d.SecretAccessKey == "" || d.SessionToken == "":
		return Key{}, nil, errors.New("incomplete")
	case life > maxSession:
		return Key{}, nil, errors.New("longer than a session can be")
	case d.Issued.Sub(now) > maxSkew:
		return Key{}, nil, errors.New("written in the future: the node's clock was set back")
	case sinceBoot < 0 || sinceBoot > up:
		return Key{}, nil, errors.New("written before the node's last boot")
	}
	// Of two clocks that disagree the one that says more is believed: at worst a session is refreshed early.
	age := max(now.Round(0).Sub(d.Issued), up-sinceBoot)
	c := NewCredentials(d.AccessKeyID, d.SecretAccessKey, d.SessionToken, d.Issued, d.Expires)
	c.RequestID = d.RequestID
	if d.Key.Duration > 0 {
		life = min(life, d.Key.Duration)
	}
	v, err := newValue(c, life, age, now, encode)
	if err != nil {
		return Key{}, nil, errEnded
	}
	return d.Key, v, nil
}

// uptime is the time since the node booted, also while it was suspended, in whole seconds. Nobody can set it.
func uptime() (time.Duration, error) {
	var info syscall.Sysinfo_t
	if err := syscall.Sysinfo(&info); err != nil {
		return 0, os.NewSyscallError("sysinfo", err)
	}
	return time.Duration(info.Uptime) * time.Second, nil
}
