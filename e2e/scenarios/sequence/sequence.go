// Package sequence is what an SDK without other configuration does for credentials: a token, the role's name, the document.
// No request is tried a second time.
package sequence

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
)

// Kinds of outcome. Wrong credentials are nobody's kind: whose they are is found out by their access key.
const (
	OK      = "ok"
	Refused = "refused" // nobody listens, or the guard says so
	Timeout = "timeout"
	Cut     = "cut"    // the connection ended under way
	Status  = "status" // any but 200
)

// Result is the outcome of one sequence.
type Result struct {
	Kind        string
	Step        string `json:",omitempty"` // token, list or document: where it ended, if not at the end
	Code        int    `json:",omitempty"` // HTTP status
	Text        string `json:",omitempty"`
	Role        string `json:",omitempty"`
	AccessKeyID string `json:",omitempty"`
	At          time.Time
	Took        time.Duration // of the whole sequence
}

// Brief is the result without what differs between any two.
func (r Result) Brief() string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %s %d %s", r.Kind, r.AccessKeyID, r.Step, r.Code, r.Text))
}

const base = "http://169.254.169.254/latest/"

// Run asks once. limit bounds each of the three requests, as boto3's second does. They share a connection, or have one each.
func Run(ctx context.Context, limit time.Duration, share bool) Result {
	transport := &http.Transport{DisableKeepAlives: !share, DisableCompression: true}
	defer transport.CloseIdleConnections()
	return Over(ctx, &http.Client{Transport: transport}, limit)
}

// Over is Run over the client's connections.
func Over(ctx context.Context, client *http.Client, limit time.Duration) Result {
	s := &asker{client: client, limit: limit}
	return timed(func() Result { return s.run(ctx) })
}

// With asks for the role's name and the document alone, over the client's connections. An empty token is none: as IMDSv1.
func With(ctx context.Context, client *http.Client, limit time.Duration, token string) Result {
	s := &asker{client: client, limit: limit, token: token}
	return timed(func() Result { return s.credentials(ctx) })
}

// Token gets one.
func Token(ctx context.Context, client *http.Client, limit time.Duration) (string, error) {
	s := &asker{client: client, limit: limit}
	token, failed := s.ask(ctx, http.MethodPut, "api/token")
	if failed != nil {
		return "", errors.New(failed.Brief())
	}
	return token, nil
}

func timed(run func() Result) Result {
	start := time.Now()
	r := run()
	r.At, r.Took = start, time.Since(start)
	return r
}

type asker struct {
	client *http.Client
	limit  time.Duration
	token  string
}

func (s *asker) run(ctx context.Context) Result {
	token, failed := s.ask(ctx, http.MethodPut, "api/token")
	if failed != nil {
		failed.Step = "token"
		return *failed
	}
	s.token = token
	return s.credentials(ctx)
}

func (s *asker) credentials(ctx context.Context) Result {
	role, failed := s.ask(ctx, http.MethodGet, "meta-data/iam/security-credentials/")
	if failed != nil {
		failed.Step = "list"
		return *failed
	}
	text, failed := s.ask(ctx, http.MethodGet, "meta-data/iam/security-credentials/"+role)
	if failed != nil {
		failed.Step = "document"
		return *failed
	}
	var document struct{ Code, AccessKeyId, SecretAccessKey, Token string }
	if err := json.Unmarshal([]byte(text), &document); err != nil || document.Code != "Success" ||
		document.SecretAccessKey == "" || document.Token == "" {
		return Result{Kind: Status, Step: "document", Code: http.StatusOK, Text: "not a document of credentials"}
	}
	return Result{Kind: OK, Role: role, AccessKeyID: document.AccessKeyId}
}

func (s *asker) ask(ctx context.Context, method, path string) (string, *Result) {
	ctx, cancel := context.WithTimeout(ctx, s.limit)
	time.AfterFunc(2*s.limit, cancel) // at once, it could still close the connection that the next request shares
	req, err := http.NewRequestWithContext(ctx, method, base+path, nil)
	if err != nil {
		return "", &Result{Kind: Cut, Text: err.Error()}
	}
	if method == http.MethodPut {
		req.Header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
	} else if s.token != "" {
		req.Header.Set("X-Aws-Ec2-Metadata-Token", s.token)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return "", &Result{Kind: kind(err), Text: err.Error()}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return "", &Result{Kind: kind(err), Text: err.Error()}
	}
	if resp.StatusCode != http.StatusOK {
		return "", &Result{Kind: Status, Code: resp.StatusCode, Text: strings.TrimSpace(string(body[:min(len(body), 300)]))}
	}
	return string(body), nil
}

func kind(err error) string {
	var ne net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return Refused
	case errors.As(err, &ne) && ne.Timeout(), errors.Is(err, os.ErrDeadlineExceeded):
		return Timeout
	}
	return Cut
}
