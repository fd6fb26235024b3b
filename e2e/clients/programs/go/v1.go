package main

import (
	"fmt"

	"github.com/aws/aws-sdk-go/aws/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go/aws/session"
)

// sdkV1 is the SDK's instance role: the session's default chain swallows its errors and cannot be
// told to ask again, so the chain's last link is used by itself. It keeps its token between fetches.
func sdkV1() (fetch, error) {
	sess, err := session.NewSession()
	if err != nil {
		return nil, fmt.Errorf("go-v1: session: %w", err)
	}
	creds := ec2rolecreds.NewCredentials(sess)
	return func() (credentials, error) {
		creds.Expire()
		v, err := creds.Get()
		if err != nil {
			return credentials{}, fmt.Errorf("go-v1: %w", err)
		}
		expires, err := creds.ExpiresAt()
		if err != nil {
			return credentials{}, fmt.Errorf("go-v1: %w", err)
		}
		return credentials{accessKeyID: v.AccessKeyID, expiration: expires}, nil
	}, nil
}
