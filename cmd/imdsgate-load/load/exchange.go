package load

import (
	"bytes"
	"errors"
	"strconv"
)

// step is one request of a sequence.
type step int

const (
	askToken step = iota
	askList
	askDocument
)

const (
	hostLine = " HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: imdsgate-load\r\nAccept: */*\r\n"
	rolePath = "/latest/meta-data/iam/security-credentials/"
)

// learned is what earlier answers say about later requests.
type learned struct {
	token []byte
	role  []byte
}

// request appends the request of a step to b.
func (l *learned) request(b []byte, s step) []byte {
	switch s {
	case askToken:
		return append(append(append(b, "PUT /latest/api/token"...), hostLine...),
			"X-aws-ec2-metadata-token-ttl-seconds: 21600\r\nContent-Length: 0\r\n\r\n"...)
	case askList:
		b = append(append(b, "GET "...), rolePath...)
	case askDocument:
		b = append(append(append(b, "GET "...), rolePath...), l.role...)
	}
	b = append(b, hostLine...)
	if len(l.token) > 0 {
		b = append(append(append(b, "X-aws-ec2-metadata-token: "...), l.token...), "\r\n"...)
	}
	return append(b, "\r\n"...)
}

// learn keeps what the answer to a step says.
func (l *learned) learn(s step, body []byte) {
	switch s {
	case askToken:
		l.token = append(l.token[:0], body...)
	case askList:
		first, _, _ := bytes.Cut(body, []byte("\n"))
		l.role = append(l.role[:0], bytes.TrimSpace(first)...)
	}
}

// response is the answer to one request.
type response struct {
	status int
	body   []byte
	close  bool // the connection serves no further request
}

var (
	errMalformed = errors.New("malformed")
	errTooLong   = errors.New("too long")
)

// parse reads an answer with a Content-Length, the only ones that SDKs are safe with. It returns false while there is more to
// come.
func parse(b []byte) (r response, ok bool, err error) {
	end := bytes.Index(b, []byte("\r\n\r\n"))
	if end < 0 {
		return r, false, nil
	}
	line, rest, _ := bytes.Cut(b[:end+2], []byte("\r\n"))
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[8] != ' ' {
		return r, false, errMalformed
	}
	if r.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return r, false, errMalformed
	}
	length := -1
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			if length, err = strconv.Atoi(string(value)); err != nil {
				return r, false, errMalformed
			}
		case bytes.EqualFold(name, []byte("connection")):
			r.close = bytes.EqualFold(value, []byte("close"))
		}
	}
	body := b[end+len([]byte("\r\n\r\n")):]
	switch {
	case length < 0 || len(body) > length:
		return r, false, errMalformed
	case len(body) < length:
		return r, false, nil
	}
	r.body = body
	return r, true, nil
}
