package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"
)

// Key identifies one STS role session. It holds every input of the issue call, so equal keys may share credentials and
// unequal keys never do (invariant 1). kube2iam keyed by the role ARN alone and handed one pod's external ID to all.
type Key struct {
	RoleARN        string
	SessionName    string
	ExternalID     string
	Namespace      string
	ServiceAccount string
	Audience       string        // of the web identity token; empty with assume-role
	Duration       time.Duration // of the session; whole seconds
	Tags           Tags          // zero: no session tags
}

// Tags are the session tags of EKS Pod Identity: eks-cluster-name, kubernetes-namespace, kubernetes-service-account.
type Tags struct{ ClusterName, Namespace, ServiceAccount string }

// Credentials are one role session. They are immutable and safe for concurrent use. Neither fmt nor slog nor encoding/json
// can reach the secret parts (invariant 9), also where a Credentials is an unexported field of another struct, whose methods
// fmt does not call.
type Credentials struct {
	AccessKeyID string
	Issued      time.Time // by this node's clocks, when the answer came
	Expires     time.Time // by STS's clock
	RequestID   string    // of the STS answer, for the audit line
	// Behind two pointers: of an unexported field fmt follows one when a verb does not fit, as in %s, and prints all of it.
	secret **secret
}

type secret struct {
	secretAccessKey, sessionToken string
	document                      []byte
}

// NewCredentials returns Credentials that hold the two secrets.
func NewCredentials(accessKeyID, secretAccessKey, sessionToken string, issued, expires time.Time) Credentials {
	s := &secret{secretAccessKey: secretAccessKey, sessionToken: sessionToken}
	return Credentials{AccessKeyID: accessKeyID, Issued: issued, Expires: expires, secret: &s}
}

// withDocument is c with a document.
func (c Credentials) withDocument(document []byte) Credentials {
	s := **c.secret
	s.document = document
	p := &s
	c.secret = &p
	return c
}

// SecretAccessKey is the signing key.
func (c Credentials) SecretAccessKey() string {
	if c.secret == nil {
		return ""
	}
	return (*c.secret).secretAccessKey
}

// SessionToken goes with every request signed with the key.
func (c Credentials) SessionToken() string {
	if c.secret == nil {
		return ""
	}
	return (*c.secret).sessionToken
}

// Document is what Options.Encode made of the credentials when they were issued. The caller must not change it.
func (c Credentials) Document() []byte {
	if c.secret == nil {
		return nil
	}
	return (*c.secret).document
}

// String names the credentials without telling them.
func (c Credentials) String() string {
	return fmt.Sprintf("credentials %s until %s", c.AccessKeyID, c.Expires.UTC().Format(time.RFC3339))
}

// GoString is String: %#v would otherwise print the fields.
func (c Credentials) GoString() string { return c.String() }

// LogValue is what slog prints.
func (c Credentials) LogValue() slog.Value {
	return slog.GroupValue(slog.String("access_key_id", c.AccessKeyID), slog.Time("expires", c.Expires.UTC()))
}

// Format prints nothing of a secret for any verb.
func (secret) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, "[redacted]") }

// Issuer makes a new role session for a key. It returns an *IssueError when STS refused or could not be reached. Issue is
// called with a context of the cache's own, never a request's (invariant 3).
type Issuer interface {
	Issue(ctx context.Context, key Key) (Credentials, error)
}

// IssueError says why no credentials could be issued. Its text is shown to the pod and in Events, so it holds no secret.
type IssueError struct {
	Code   string // STS's error code, such as AccessDenied; empty when no answer came
	Denied bool   // STS answered and refused: somebody must change a policy or an annotation. False: trying again may help
	// Throttled: STS gets too many requests, of this node or of others of the account. The cache then asks less often.
	Throttled bool
	Hint      string // what to change; empty when there is nothing to say
	Err       error
}

func (e *IssueError) Error() string {
	s := e.Err.Error()
	if e.Hint != "" {
		s += "; fix: " + e.Hint
	}
	return s
}

func (e *IssueError) Unwrap() error { return e.Err }

// ErrUnavailable is what Get returns when nothing valid is cached and nothing could be had before its deadline. Asking
// again helps.
var ErrUnavailable = errors.New("no credentials available yet")
