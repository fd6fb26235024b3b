package proxy

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	tokenVersion  = 1
	tokenHead     = 1 + 8 + 8 // version, issue time and expiry in Unix milliseconds
	tokenMACSize  = 25        // of the HMAC's 32 bytes
	tokenRaw      = tokenHead + tokenMACSize
	tokenKeySize  = 32
	tokenKeyFile  = "token.key"
	maxTokenTTL   = 21600
	maxTTLDigits  = 5
	ownerOnlyMode = 0o077 // no permission for anybody else
	noWriteMode   = 0o022 // no write permission for anybody else
)

// tokens issues and checks IMDSv2 session tokens. They are stateless, so issuing one depends on nothing, and survive a
// restart with the key: some SDKs hold theirs for six hours. A token is no credential: it shows that its bearer could send
// a PUT, which a forged cross-site or server-side GET cannot. Who the caller is, is told by its connection.
//
// A token has 56 characters, as the real endpoint's. More than 64 do not fit the buffer of aws-c-auth 0.6 (CRT 0.16), which
// then fails without a word.
type tokens struct {
	encoding *base64.Encoding
	macs     sync.Pool
}

// tokenMAC is what one check needs; pooled, because hash.Hash makes everything passed to it escape.
type tokenMAC struct {
	hash.Hash
	raw [tokenRaw]byte
	ip  [16]byte
	sum [sha256.Size]byte
}

func newTokens(key []byte) *tokens {
	key = append([]byte(nil), key...)
	return &tokens{
		encoding: base64.RawURLEncoding.Strict(),
		macs:     sync.Pool{New: func() any { return &tokenMAC{Hash: hmac.New(sha256.New, key)} }},
	}
}

// sign is the HMAC over the head of m.raw and ip, without a zone and with IPv4 mapped.
func (m *tokenMAC) sign(ip netip.Addr) []byte {
	m.ip = ip.As16()
	m.Reset()
	_, _ = m.Write(m.raw[:tokenHead]) // never fails
	_, _ = m.Write(m.ip[:])
	return m.Sum(m.sum[:0])[:tokenMACSize]
}

func (t *tokens) issue(ip netip.Addr, now time.Time, ttl time.Duration) string {
	m := t.macs.Get().(*tokenMAC)
	defer t.macs.Put(m)
	m.raw[0] = tokenVersion
	putMillis(m.raw[1:], now)
	putMillis(m.raw[9:], now.Add(ttl))
	copy(m.raw[tokenHead:], m.sign(ip))
	return t.encoding.EncodeToString(m.raw[:])
}

func (t *tokens) check(ip netip.Addr, token string, now time.Time) (issued, bool) {
	if len(token) != t.encoding.EncodedLen(tokenRaw) {
		return issued{}, false
	}
	m := t.macs.Get().(*tokenMAC)
	defer t.macs.Put(m)
	var text [tokenRaw*4/3 + 1]byte
	n, err := t.encoding.Decode(m.raw[:], text[:copy(text[:], token)])
	if err != nil || n != tokenRaw || m.raw[0] != tokenVersion || !hmac.Equal(m.raw[tokenHead:], m.sign(ip)) {
		return issued{}, false
	}
	i := issued{millis(m.raw[1:]), millis(m.raw[9:])}
	return i, now.Before(i.until)
}

// shown is the session token that last counted on a connection. SDKs show one for both of their requests, load tests for all: its
// MAC, which is over the connection's own IP, would come out the same. The text is a copy: a header's string keeps the whole head in
// memory.
type shown struct {
	token  [tokenRaw * 4 / 3]byte
	issued issued
}

// checkAgain is check for the requests of one connection.
func (t *tokens) checkAgain(last *shown, ip netip.Addr, token string, now time.Time) (issued, bool) {
	if string(last.token[:]) == token && now.Before(last.issued.until) {
		return last.issued, true
	}
	i, ok := t.check(ip, token, now)
	if ok {
		copy(last.token[:], token)
		last.issued = i
	}
	return i, ok
}

func putMillis(b []byte, t time.Time) {
	binary.BigEndian.PutUint64(b, uint64(t.UnixMilli()))
}

func millis(b []byte) time.Time {
	return time.UnixMilli(int64(binary.BigEndian.Uint64(b))) // only what putMillis wrote has a valid MAC
}

// issued is when a session token was issued, and until when it counts; zero without one.
type issued struct{ at, until time.Time }

// before tells that the token belongs to whoever held the IP before since. A token knows its time to the millisecond, so since
// counts no finer. One in the future would lock the pod out because some clock is wrong: it says nothing.
func (i issued) before(since, now time.Time) bool {
	if i.at.IsZero() || since.IsZero() || since.After(now) {
		return false
	}
	return i.at.UnixMilli() < since.UnixMilli()
}

// parseTTL takes decimal digits only: strconv alone would take a sign.
func parseTTL(s string) (time.Duration, bool) {
	if len(s) > maxTTLDigits {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n < 1 || n > maxTokenTTL {
		return 0, false
	}
	return time.Duration(n) * time.Second, true
}

// LoadTokenKey reads the key for session tokens from token.key in dir, and makes both when they are missing, and the key when it
// is not whole. Two daemons that start at once end with the same key. It refuses a directory or file that somebody other than root
// and this process could have written, and symbolic links. With an empty dir it returns a random key that is not kept.
func LoadTokenKey(dir string) ([]byte, error) {
	if dir == "" {
		return newTokenKey()
	}
	key, err := loadTokenKey(dir)
	if err != nil {
		return nil, fmt.Errorf("token key in the state directory %s: %w", dir, err)
	}
	return key, nil
}

func newTokenKey() ([]byte, error) {
	key := make([]byte, tokenKeySize)
	_, err := rand.Read(key)
	return key, err
}

func loadTokenKey(dir string) ([]byte, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	link, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !link.IsDir() { // to open a named pipe would block
		return nil, errors.New("must be a directory, not a symbolic link or a file of any kind")
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	opened, err := root.Stat(".")
	if err != nil {
		return nil, err
	}
	if !os.SameFile(link, opened) {
		return nil, errors.New("was replaced while it was opened")
	}
	if err := trusted("the directory", opened, noWriteMode); err != nil {
		return nil, err
	}
	key, err := readTokenKey(root)
	if errors.Is(err, errKeySize) { // nothing that could be kept: the tokens of before are lost either way
		if err = root.Remove(tokenKeyFile); err == nil {
			err = fs.ErrNotExist
		}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err := createTokenKey(root); err != nil {
		return nil, err
	}
	return readTokenKey(root)
}

// errKeySize is of a file that was cut off, by a disk that was full for instance.
var errKeySize = fmt.Errorf("%s is not of %d bytes", tokenKeyFile, tokenKeySize)

func readTokenKey(root *os.Root) ([]byte, error) {
	f, err := root.OpenFile(tokenKeyFile, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a named pipe would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	link, err := root.Lstat(tokenKeyFile)
	if err != nil {
		return nil, err
	}
	opened, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !os.SameFile(link, opened) || !opened.Mode().IsRegular() {
		return nil, fmt.Errorf("%s must be a regular file: remove it", tokenKeyFile)
	}
	if err := trusted(tokenKeyFile, opened, ownerOnlyMode); err != nil {
		return nil, err
	}
	if opened.Size() != tokenKeySize {
		return nil, errKeySize
	}
	key := make([]byte, tokenKeySize)
	_, err = f.ReadAt(key, 0)
	return key, err
}

// createTokenKey leaves a complete file or none. If another daemon was first, its file stays.
func createTokenKey(root *os.Root) error {
	key, err := newTokenKey()
	if err != nil {
		return err
	}
	temp := tokenKeyFile + "." + rand.Text()
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer root.Remove(temp)
	_, err = f.Write(key)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := root.Link(temp, tokenKeyFile); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// trusted wants root or this process as the owner, and none of the forbidden permission bits.
func trusted(name string, fi fs.FileInfo, forbidden fs.FileMode) error {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no owner known", name)
	}
	if st.Uid != 0 && int64(st.Uid) != int64(os.Geteuid()) {
		return fmt.Errorf("%s belongs to uid %d: chown it to root or to uid %d", name, st.Uid, os.Geteuid())
	}
	if fi.Mode().Perm()&forbidden != 0 {
		return fmt.Errorf("%s has mode %#o: chmod it to %#o", name, fi.Mode().Perm(), fi.Mode().Perm()&^forbidden)
	}
	return nil
}
