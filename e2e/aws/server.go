package aws

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// Options of a Server.
type Options struct {
	Region string // of the endpoints that do not name one; empty: us-east-1
	Roles  []Role
	// NodeRoleARN is the role whose credentials NodeCredentials returns; one of Roles.
	NodeRoleARN string
	Providers   []Provider // OIDC providers
	Buckets     []string   // what ListBuckets answers
	Groups      []string   // what ListGroups answers
	Now         func() time.Time
}

// Server is the stand-in. It is an http.Handler, starts nothing and is safe for concurrent use.
type Server struct {
	region  string
	node    string
	buckets []string
	groups  []string
	now     func() time.Time
	signer  *v4.Signer
	started time.Time

	mu            sync.Mutex
	roles         map[string]Role
	providers     []Provider
	sessions      map[string]*session // by access key id
	faults        []*Fault
	sessionLength time.Duration
	calls         []Call
	called        chan struct{} // closed and replaced with every call
}

// New returns a Server that knows these roles and providers.
func New(o Options) (*Server, error) {
	s := &Server{
		region: o.Region, node: o.NodeRoleARN, buckets: o.Buckets, groups: o.Groups, now: o.Now,
		signer: v4.NewSigner(), roles: make(map[string]Role), providers: slices.Clone(o.Providers),
		sessions: make(map[string]*session), called: make(chan struct{}),
	}
	if s.region == "" {
		s.region = "us-east-1"
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.started = s.now()
	for _, r := range o.Roles {
		if err := s.SetRole(r); err != nil {
			return nil, err
		}
	}
	if _, ok := s.roles[o.NodeRoleARN]; o.NodeRoleARN != "" && !ok {
		return nil, fmt.Errorf("the node role %s is not among the roles", o.NodeRoleARN)
	}
	return s, nil
}

// SetRole adds a role or replaces it: the next call sees it, sessions of it keep what they are allowed by its new policy.
func (s *Server) SetRole(r Role) error {
	if err := r.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roles[r.ARN] = r
	return nil
}

// DeleteRole removes a role; its sessions are refused everything but GetCallerIdentity.
func (s *Server) DeleteRole(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.roles, arn)
}

// SetSessionLength makes sessions issued from now on last d, whatever was asked for: time compressed for a test. Requests are
// judged by what they ask for all the same. 0 restores the rule.
func (s *Server) SetSessionLength(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessionLength = d
}

// NodeCredentials returns a new session of the node role, as the metadata endpoint of an instance would serve it. It lasts
// 6 h.
func (s *Server) NodeCredentials() (Credentials, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	role, ok := s.roles[s.node]
	if !ok {
		return Credentials{}, errors.New("there is no node role")
	}
	return s.issue(&session{
		role: role.ARN, name: "i-0123456789abcdef0", arn: role.sessionARN("i-0123456789abcdef0"), account: role.account(), node: true,
		expires: s.now().Add(6 * time.Hour),
	}), nil
}

// UserCredentials returns a new access key of an IAM user who is allowed these actions: not a role session, so no chaining.
func (s *Server) UserCredentials(arn string, allow ...string) (Credentials, error) {
	parsed, err := parseARN(arn)
	if err != nil || parsed.Service != "iam" || !strings.HasPrefix(parsed.Resource, "user/") {
		return Credentials{}, fmt.Errorf("%q is not the ARN of a user", arn)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.issue(&session{arn: arn, account: parsed.AccountID, user: true, allow: allow}), nil
}

// Credentials is what a client needs. Expires is zero for those of a user.
type Credentials struct {
	AccessKeyID, SecretAccessKey, SessionToken string
	Expires                                    time.Time
}

// SDK returns the credentials as the SDK's type.
func (c Credentials) SDK() awssdk.Credentials {
	return awssdk.Credentials{
		AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, SessionToken: c.SessionToken,
		CanExpire: !c.Expires.IsZero(), Expires: c.Expires,
	}
}

// Owner says whose an access key is.
type Owner struct {
	RoleARN     string // empty: a user's
	SessionName string
	ARN         string // as GetCallerIdentity shows it
	Node        bool   // the node's own
	Tags        map[string]string
	Expires     time.Time
}

// Owner looks up an access key that this server issued.
func (s *Server) Owner(accessKeyID string) (Owner, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.sessions[accessKeyID]
	if !ok {
		return Owner{}, false
	}
	return Owner{RoleARN: c.role, SessionName: c.name, ARN: c.arn, Node: c.node, Tags: maps.Clone(c.tags), Expires: c.expires}, true
}

// session is a caller: a role session or a user.
type session struct {
	credentials Credentials
	role        string
	name        string
	arn         string
	account     string
	node, user  bool
	allow       []string // of a user; a role's own is looked up with every call
	tags        map[string]string
	expires     time.Time
}

// issue makes up credentials for a session that is otherwise complete. The caller holds s.mu.
func (s *Server) issue(c *session) Credentials {
	prefix := "ASIA"
	if c.user {
		prefix = "AKIA"
	} else {
		// Real session tokens are opaque and several hundred characters long.
		c.credentials.SessionToken = "IQoJb3JpZ2luX2Vj" + random(base64Alphabet, 400)
	}
	c.credentials.AccessKeyID = prefix + random("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16)
	c.credentials.SecretAccessKey = random(base64Alphabet, 40)
	if s.sessionLength != 0 && !c.user && !c.node {
		c.expires = s.now().Add(s.sessionLength)
	}
	c.expires = c.expires.Truncate(time.Second) // as it is written in answers
	c.credentials.Expires = c.expires
	s.sessions[c.credentials.AccessKeyID] = c
	return c.credentials
}

const base64Alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

// random returns n characters of an alphabet of 32 or 64.
func random(alphabet string, n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails
	for i := range b {
		b[i] = alphabet[int(b[i])%len(alphabet)]
	}
	return string(b)
}

// maxBody is far more than any of these operations needs.
const maxBody = 256 << 10

// request is a call in the making.
type request struct {
	http    *http.Request
	body    []byte
	form    url.Values // of STS and IAM
	service string     // sts, iam, s3
	regions []string   // that the signature may be scoped to; the first is the endpoint's own
	caller  *session   // nil: anonymous
	call    Call
}

// ServeHTTP answers one call of one of the services.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	req := &request{http: r}
	req.call.Time, req.call.Source, req.call.RequestID = s.now(), r.RemoteAddr, requestID()
	var answer any
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		answer = refusal{http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", err.Error()}
	} else {
		req.body = body
		answer = s.serve(r.Context(), req)
	}
	switch a := answer.(type) {
	case hangup:
		req.call.Outcome = "hangup"
		s.log(req.call)
		panic(http.ErrAbortHandler) //nolint:forbidigo // how a handler of net/http closes the connection
	case refusal:
		req.call.Outcome = a.code
		s.log(req.call)
		writeRefusal(w, req, a)
	default:
		req.call.Outcome = OK
		s.log(req.call)
		write(w, req, http.StatusOK, a)
	}
}

// serve returns what to answer: a document, a refusal or a hangup.
func (s *Server) serve(ctx context.Context, r *request) any {
	if refused := s.route(r); refused != nil {
		return *refused
	}
	if fault := s.fault(r.call.Operation, r.call.RoleARN); fault != nil {
		if answer := fault.apply(ctx); answer != nil {
			return answer
		}
	}
	operation, ok := s.operation(r.service, r.call.Operation)
	if !ok {
		return refusal{http.StatusBadRequest, "InvalidAction",
			fmt.Sprintf("Could not find operation %s for version %s", r.call.Operation, r.form.Get("Version"))}
	}
	if !operation.anonymous {
		if refused := s.authenticate(ctx, r); refused != nil {
			return *refused
		}
	}
	if refused := operation.checkForm(r.form); refused != nil {
		return *refused
	}
	answer, refused := operation.do(ctx, r)
	if refused != nil {
		return *refused
	}
	return answer
}

// route finds the service and the operation: by host name as AWS does, otherwise, at a plain endpoint, by what the request
// looks like.
func (s *Server) route(r *request) *refusal {
	host := r.http.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if host, ok := strings.CutSuffix(host, ".amazonaws.com"); ok {
		service, region, _ := strings.Cut(host, ".")
		r.service = service
		switch {
		case region != "":
			r.regions = []string{region}
		default: // iam.amazonaws.com, and the global endpoints of sts and s3
			r.regions = []string{"us-east-1"}
		}
	} else {
		r.regions = []string{s.region}
	}
	if r.service != "s3" {
		form, err := parseForm(r.http, r.body)
		if err != nil {
			return &refusal{http.StatusBadRequest, "MalformedQueryString", err.Error()}
		}
		r.form = form
	}
	if r.service == "" {
		switch {
		case r.form.Get("Action") == "":
			r.service, r.form = "s3", nil
		case r.form.Get("Version") == iamVersion:
			// Clients sign for us-east-1, where IAM is, or for their own region because the endpoint is not AWS's.
			r.service, r.regions = "iam", append(r.regions, "us-east-1")
		default:
			r.service = "sts"
		}
	}
	switch r.service {
	case "s3":
		query := r.http.URL.RawQuery
		if r.http.Method != http.MethodGet || r.http.URL.Path != "/" || query != "" && query != "x-id=ListBuckets" {
			return &refusal{http.StatusNotImplemented, "NotImplemented", "only ListBuckets is served here"}
		}
		r.call.Operation = "ListBuckets"
		return nil
	case "sts", "iam":
		r.call.Operation, r.call.RoleARN, r.call.SessionName = r.form.Get("Action"), r.form.Get("RoleArn"), r.form.Get("RoleSessionName")
		version := stsVersion
		if r.service == "iam" {
			version = iamVersion
		}
		if r.call.Operation == "" {
			return &refusal{http.StatusForbidden, "MissingAction", "The request is missing an action"}
		}
		if r.http.URL.Path != "/" || r.form.Get("Version") != version {
			return &refusal{http.StatusBadRequest, "InvalidAction",
				fmt.Sprintf("Could not find operation %s for version %s", r.call.Operation, r.form.Get("Version"))}
		}
		return nil
	}
	return &refusal{http.StatusNotImplemented, "NotImplemented", "no such service here: " + r.http.Host}
}

// parseForm reads the parameters of the query protocol: in the body of a POST, else in the query.
func parseForm(r *http.Request, body []byte) (url.Values, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, err
	}
	if r.Method != http.MethodPost || len(body) == 0 {
		return query, nil
	}
	if t, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";"); strings.TrimSpace(t) != "application/x-www-form-urlencoded" {
		return nil, fmt.Errorf("Content-Type %q is not that of a form", r.Header.Get("Content-Type"))
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, err
	}
	for k, v := range query {
		form[k] = append(form[k], v...)
	}
	return form, nil
}

func requestID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// OK is the outcome of a call that succeeded.
const OK = "OK"

// Call is one call that the server saw.
type Call struct {
	Time        time.Time
	Operation   string // AssumeRole, ListBuckets, …
	RoleARN     string // of the role to be assumed
	SessionName string
	ExternalID  string
	Tags        map[string]string // session tags asked for
	Duration    time.Duration     // asked for
	Source      string            // address and port of the connection
	AccessKeyID string            // that signed, once verified
	Caller      string            // its ARN; with a web identity the token's subject
	Issued      string            // access key id of the session issued
	RequestID   string
	Outcome     string // OK, the error's code, or hangup
}

// Calls returns what was called, oldest first.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// WaitCalls waits until n calls match and returns them.
func (s *Server) WaitCalls(ctx context.Context, n int, match func(Call) bool) ([]Call, error) {
	for {
		s.mu.Lock()
		var found []Call
		for _, c := range s.calls {
			if match(c) {
				found = append(found, c)
			}
		}
		called := s.called
		s.mu.Unlock()
		if len(found) >= n {
			return found, nil
		}
		select {
		case <-called:
		case <-ctx.Done():
			return found, fmt.Errorf("%d of %d calls: %w", len(found), n, ctx.Err())
		}
	}
}

func (s *Server) log(c Call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, c)
	close(s.called)
	s.called = make(chan struct{})
}

// reader gives the body back to whoever signs the request again.
func (r *request) reader() io.ReadCloser { return io.NopCloser(bytes.NewReader(r.body)) }
